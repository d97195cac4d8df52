"""A small service that turns events of the outside world into Prefect events."""
