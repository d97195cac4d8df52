"""What the launcher asks of its server while that comes up: is it live, do known bytes come back, load what is routed.

Known bytes go through the echo model and must come back unchanged (with numpy 2 they would not, without any error); only then
the models that `routing/*.json` name are loaded. Version 2 of `selfcheck` is ready when everything is. The standard library
and numpy only.
"""

import http.client
import json
import shutil
import sys
import time

try:
    import numpy as np
except ModuleNotFoundError:  # said in a sentence by check_machine
    np = None

ADMIN_HEADER = "tirewatch-admin"
SELFCHECK = "selfcheck"
READY_WITHIN = 60.0
LOAD_WITHIN = 300.0


class Refusal(RuntimeError):
    """The server must not serve; the message is one sentence."""


def bring_up(server, root, port, key):
    """Waits for the server, proves that bytes pass unchanged, then loads what is routed."""
    wait_until_live(server, port)
    check_echo(port)
    for model in routed_models(root):
        load(port, model, key)
    load_selfcheck_ready(root, port, key)


def wait_until_live(server, port):
    deadline = time.monotonic() + READY_WITHIN
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise Refusal(f"tritonserver ended with {server.returncode} at its start; its own words are above.")
        try:
            if request(port, "GET", f"/v2/models/{SELFCHECK}/ready")[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.05)
    raise Refusal(f"tritonserver did not answer on 127.0.0.1:{port} within {READY_WITHIN:.0f} s.")


def known_tensors():
    """Several types and shapes, none of them symmetric: what a wrong stride or width would change."""
    counting = np.arange(3 * 5 * 7 * 3)
    return {
        "bytes": ("UINT8", (np.arange(1021) * 37 % 251).astype(np.uint8)),
        "pixels": ("UINT8", (counting * 31 % 253).astype(np.uint8).reshape(3, 5, 7, 3)),
        "floats": ("FP32", np.linspace(-1e3, 1e3, 391, dtype=np.float32).reshape(17, 23)),
        "integers": ("INT64", np.array([1, -2, 3, 2**40], dtype=np.int64)),
    }


def check_echo(port):
    """Raises Refusal when known tensors come back changed."""
    for name, (kind, sent) in known_tensors().items():
        came = echo(port, name, kind, sent)
        if came.shape != sent.shape or not np.array_equal(came, sent):
            raise Refusal(
                f"known {kind} values came back changed through the Python backend ({name}: sent {sent.ravel()[:4].tolist()}, "
                f"got {came.ravel()[:4].tolist()}): the serving environment does not fit this server, run `make install`."
            )


def echo(port, name, kind, sent):
    """The tensor as the server gives it back, over the binary tensor extension of HTTP."""
    data = sent.tobytes()
    described = {
        "name": name,
        "shape": list(sent.shape),
        "datatype": kind,
        "parameters": {"binary_data_size": len(data)},
    }
    asked = {"inputs": [described], "outputs": [{"name": name, "parameters": {"binary_data": True}}]}
    header = json.dumps(asked).encode()
    status, answer, headers = request(
        port,
        "POST",
        f"/v2/models/{SELFCHECK}/infer",
        header + data,
        {"Inference-Header-Content-Length": str(len(header)), "Content-Type": "application/octet-stream"},
    )
    if status != 200:
        raise Refusal(f"the echo of {name} failed with HTTP {status}: {answer[:300].decode(errors='replace')}")
    length = int(headers.get("Inference-Header-Content-Length", len(answer)))
    output = json.loads(answer[:length])["outputs"][0]
    return np.frombuffer(answer[length:], dtype=sent.dtype).reshape(output["shape"]) if answer[length:] else sent[:0]


def routed_models(root):
    """What the routing tables name: the network models first, then the front doors that need them."""
    networks, doors = set(), []
    for path in sorted((root / "routing").glob("*.json")):
        try:
            table = json.loads(path.read_text())
            networks |= {table[role]["network"] for role in ("champion", "previous", "challenger") if table.get(role)}
        except (ValueError, KeyError, TypeError) as error:
            print(f"{path} is no routing table ({error}): {path.stem} is not served", file=sys.stderr, flush=True)
            continue
        doors.append(path.stem)
    return [*sorted(networks), *doors]


def load(port, model, key):
    """Loads one model. A model that fails is said aloud and does not keep the others from serving. Over HTTP, because this is
    the standard library only; nobody has been told yet that the server is ready.
    """
    headers = {ADMIN_HEADER: key} if key else {}
    status, answer, _ = request(port, "POST", f"/v2/repository/models/{model}/load", b"{}", headers, LOAD_WITHIN)
    if status != 200:
        print(
            f"{model} was not loaded (HTTP {status}): {answer[:1000].decode(errors='replace')}",
            file=sys.stderr,
            flush=True,
        )


def request(port, method, path, body=None, headers=None, timeout=10.0):
    """(status, body, headers) of one HTTP request to the server. Raises OSError while nobody listens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers
    except http.client.HTTPException as error:
        raise OSError(str(error)) from error
    finally:
        connection.close()


def load_selfcheck_ready(root, port, key):
    model = root / "selfcheck" / SELFCHECK
    shutil.copytree(model / "1", model / "2")
    load(port, SELFCHECK, key)
