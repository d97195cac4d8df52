"""What one training run is told: bounded and described, because it is the form in the Prefect UI. Imports pydantic only."""

from typing import TYPE_CHECKING, Annotated, Final, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from tasks.evaluation import Evaluation

ZooName = Literal[
    "mlp",
    "tinyvgg",
    "cnn",
    "vgg11",
    "vgg16",
    "resnet18",
    "resnet50",
    "efficientnet_lite0",
    "efficientnet_b0",
    "efficientnet_b1",
    "efficientnet_b2",
]
ARCHITECTURES: Final[tuple[str, ...]] = get_args(ZooName)
UNTRAINED: Final = ("mlp", "tinyvgg", "cnn")  # nobody publishes weights for these


def known_architecture(name: str) -> str:
    """The name, where it is one of the zoo or of torchvision's classifiers. ValueError listing them otherwise."""
    if name not in ARCHITECTURES:
        # It imports torchvision: only for a name that is none of ours.
        from tasks.zoo import require_torchvision_classifier

        require_torchvision_classifier(name)
    return name


Architecture = Annotated[ZooName | str, AfterValidator(known_architecture)]


class Augmentation(BaseModel):
    """How training photographs are varied. Turns and flips are right where a part may lie in any direction."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    flip_horizontal: bool = Field(default=True, description="Mirror left and right")
    flip_vertical: bool = Field(default=False, description="Mirror top and bottom")
    quarter_turns: bool = Field(default=False, description="Turn by 0, 90, 180 or 270 degrees")
    rotation: float = Field(
        default=0.0, ge=0, le=180, description="Turn by up to this many degrees, either way, edges repeated"
    )
    shift: float = Field(default=0.0, ge=0, le=0.25, description="Move by up to this share of the side, edges repeated")
    zoom: float = Field(default=0.0, ge=0, le=0.5, description="Enlarge or shrink by up to this share, edges repeated")
    erase: float = Field(
        default=0.0,
        ge=0,
        le=0.5,
        description="Cover a square of up to this share of the area with the mean colour, so that no single place decides",
    )
    brightness: float = Field(default=0.1, ge=0, le=0.5, description="Add up to this share of full scale, up or down")
    contrast: float = Field(
        default=0.1, ge=0, le=0.5, description="Stretch the contrast by up to this share, up or down"
    )
    saturation: float = Field(default=0.0, ge=0, le=1, description="More or less colourful by up to this share")
    hue: float = Field(
        default=0.0, ge=0, le=0.5, description="Turn the colours by up to this share of the colour circle, either way"
    )
    exposure: float = Field(default=0.0, ge=0, le=2, description="Expose by up to this many stops more or less")


# How often a training is kept, and whether it is taken up again, changes nothing about what comes out.
NOT_IDENTITY: Final = {"checkpoint_minutes", "resume"}


class ThresholdRule(BaseModel):
    """How the operating threshold on the defect score is chosen, on the validation split."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rule: Literal["accuracy", "balanced_accuracy", "recall", "cost"] = Field(
        default="accuracy",
        description="Most right decisions, or the best mean of both rates (within one standard error of it the threshold "
        "nearest to 0.5); a required recall; or the least cost",
    )
    recall: float = Field(default=0.95, gt=0, le=1, description="Rule recall: share of defects that must be caught")
    miss_cost: float = Field(default=10.0, gt=0, description="Rule cost: what one missed defect costs")
    overkill_cost: float = Field(default=1.0, gt=0, description="Rule cost: what one good part rejected costs")


class TrainConfig(BaseModel):
    """One training run. The defaults suit a few thousand photographs and two processor cores."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: Architecture = Field(
        default="efficientnet_lite0", description="A network of the zoo, or any torchvision classifier by its name"
    )
    pretrained: bool = Field(
        default=True, description="Start from ImageNet weights (not for mlp, tinyvgg and cnn, which have none)"
    )
    image_size: int = Field(default=160, ge=16, le=768, description="Side in pixels of the square the network sees")
    defect_labels: tuple[str, ...] = Field(
        default=(), description="Classes that count as a defect; empty: plain multi-class"
    )

    epochs: int = Field(default=6, ge=1, le=500, description="Passes over the training split, at most")
    max_minutes: float = Field(
        default=30.0, gt=0, le=2880, description="Training time; epochs that do not fit are dropped"
    )
    batch_size: int = Field(default=32, ge=4, le=1024, description="Photographs a step")
    optimizer: Literal["adamw", "adam", "sgd"] = Field(default="adamw", description="Optimizer")
    learning_rate: float = Field(default=1e-3, gt=0, le=1, description="Peak learning rate")
    head_rate: float = Field(default=1.0, ge=1, le=100, description="The new head learns this many times faster")
    weight_decay: float = Field(default=0.01, ge=0, le=1, description="Weight decay; none on biases and norms")
    schedule: Literal["one_cycle", "cosine", "constant", "step", "plateau"] = Field(
        default="one_cycle", description="Learning rate over the run"
    )
    rate_factor: float = Field(
        default=0.1, gt=0, lt=1, description="Schedules step and plateau: each fall of the rate, as a factor"
    )
    rate_epochs: int = Field(
        default=3,
        ge=1,
        le=100,
        description="Schedule step: it falls every so many epochs; plateau: after so many without a better validation loss",
    )
    clip_norm: float | None = Field(
        default=None, gt=0, description="Longest gradient of a step (2-norm over all weights); empty: any length"
    )
    frozen_stages: int = Field(
        default=0, ge=0, le=6, description="First stages of a pretrained network that are not trained"
    )
    loss: Literal["cross_entropy", "focal"] = Field(
        default="cross_entropy", description="focal (Lin et al. 2017) counts what is already easy for less"
    )
    focal_gamma: float = Field(default=2.0, ge=0, le=10, description="Loss focal: how much less; 0 is cross entropy")
    label_smoothing: float = Field(default=0.05, ge=0, lt=0.5, description="Label smoothing of the training loss")
    class_weights: bool = Field(
        default=True, description="Weigh the loss so that rare classes count as much as common ones"
    )
    augmentation: Augmentation = Field(default=Augmentation(), description="How training photographs are varied")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="auto times both at the start and takes the faster; name one for bitwise repeatable runs",
    )
    deterministic: bool = Field(
        default=False,
        description="Only operations that give the same bits every time: slower on a GPU, where some do not exist",
    )
    compile: bool = Field(
        default=False, description="torch.compile: a minute or more at the start, faster steps for long trainings"
    )
    processes: int = Field(
        default=1, ge=1, le=64, description="Processes that share each batch (torchrun); on GPUs one for each"
    )
    checkpoint_minutes: float = Field(
        default=5.0, gt=0, le=720, description="A checkpoint at least so often, besides the one after each epoch"
    )
    resume: bool = Field(
        default=True, description="Go on where an interrupted training of the same configuration and data stopped"
    )
    seed: int = Field(default=7, ge=0, lt=2**31, description="Seed of weights, order and augmentation")

    patience: int = Field(
        default=5, ge=1, le=100, description="Epochs without a better validation loss before stopping"
    )
    min_delta: float = Field(default=0.001, ge=0, le=1, description="What counts as a better validation loss")
    stop_at_accuracy: float | None = Field(
        default=None, gt=0, le=1, description="Stop when validation accuracy reaches this"
    )
    stop_at_loss: float | None = Field(
        default=None,
        gt=0,
        description="Stop when validation loss is at most this; with the accuracy given too, at both",
    )

    threshold: ThresholdRule = Field(default=ThresholdRule(), description="How the operating threshold is chosen")
    minimum_accuracy: float = Field(
        default=0.7, ge=0, le=1, description="Validation accuracy below which nothing is registered"
    )
    minimum_balanced_accuracy: float = Field(
        default=0.6, ge=0, le=1, description="The same for the mean of the class recalls"
    )
    continue_from: int | None = Field(
        default=None, ge=1, description="Registered version whose weights training starts from"
    )

    @model_validator(mode="after")
    def _shares_are_batches(self) -> "TrainConfig":
        if self.processes > 1 and self.batch_size < 4 * self.processes:
            raise ValueError(
                f"batch_size {self.batch_size} shared by {self.processes} processes leaves fewer than 4 photographs each: "
                f"at least {4 * self.processes}, or fewer processes"
            )
        return self

    @model_validator(mode="after")
    def _weights_exist(self) -> "TrainConfig":
        if self.frozen_stages and not (self.pretrained or self.continue_from):
            raise ValueError(f"frozen_stages={self.frozen_stages} without trained weights would freeze random ones")
        if self.pretrained and self.architecture in UNTRAINED:
            raise ValueError(f"there are no pretrained weights for {self.architecture}: set pretrained to false")
        return self


def below_minimum(validation: "Evaluation", config: TrainConfig) -> tuple[str, ...]:
    """Why the model must not be registered, each reason with its numbers; empty when it may."""
    found = (
        ("accuracy", validation.figures.accuracy, config.minimum_accuracy),
        ("balanced accuracy", validation.figures.balanced_accuracy, config.minimum_balanced_accuracy),
    )
    return tuple(
        f"validation {name} {value:.4f} is below the minimum {least:.4f}"
        for name, value, least in found
        if value < least
    )
