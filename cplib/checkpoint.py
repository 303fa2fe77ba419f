"""Checkpoints: stop training at any moment, and resume as if nothing had happened."""

import contextlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cplib.datasets import atomic


def save(path, about, total, update, history, sums, net, optimizer, generator, scaler) -> None:
    """Write all that training needs to resume as if nothing had happened, whole or not at all.

    ``about`` is what ``train.provenance`` returns. After the last of ``total`` updates, the
    optimiser's state is left out: it would be half of the file or more.
    """
    tensors = {f"net.{k}": v.contiguous() for k, v in net.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items() if update < total else ():
        tensors |= {f"optimizer.{i}.{k}": v.contiguous() for k, v in state.items()}
    tensors |= {"generator": generator.get_state(), "sums": sums}
    meta = about | {"update": str(update), "history": json.dumps(history)}
    meta["scaler"] = json.dumps(scaler.state_dict())
    with atomic(Path(path)) as part:
        save_file(tensors, part, metadata=meta)


def read_checkpoint(path: str | Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """What a checkpoint says about itself, and its tensors. Raises SafetensorError or OSError."""
    with safe_open(path, "pt") as file:
        meta = file.metadata() or {"run": "another program"}
        return meta, {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118


def network_state(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The network's tensors among those of a checkpoint."""
    return {k[4:]: v for k, v in tensors.items() if k.startswith("net.")}


def usable(path, about, total, precisions) -> tuple[dict[str, str], dict[str, torch.Tensor]] | None:
    """What ``read_checkpoint`` returns, or None if training has to start from the beginning.

    It starts from the beginning if the checkpoint is damaged (it is renamed), was made from other
    images, or with another version of the random draws. The same holds for another device, or a
    precision that is not in ``precisions``, unless all ``total`` updates were done. A line is
    printed. ``about`` describes the new training.
    Raises ValueError for the checkpoint of another run.
    """
    if path is None or not Path(path).exists():
        return None
    try:
        meta, tensors = read_checkpoint(path)
    except (SafetensorError, OSError) as error:
        with contextlib.suppress(FileNotFoundError):  # another process finished the run
            Path(path).replace(Path(path).with_suffix(".broken"))
        print(f"{path}: not a checkpoint ({error}); training starts afresh")
        return None
    if meta["run"] != about["run"]:
        raise ValueError(f"{path}: is a checkpoint of {meta['run']}, not of {about['run']}")
    finished, kept = int(meta["update"]) == total, meta["precision"]
    meta.setdefault("draws", "1")
    for name in ("data", "draws") if finished else ("data", "draws", "device"):
        if meta[name] != about[name]:  # the same batches would not follow
            words = {"draws": "version of random draws"}.get(name, name)
            print(f"{path}: of another {words} ({meta[name]}); training starts afresh")
            return None
    if not finished and kept not in precisions:
        line = f"{path}: of another precision ({kept}); training starts afresh"
        print(f"{line} (with CPLIB_PRECISION={kept} it resumes)")
        return None
    return meta, tensors


def resume(found, total, net, optimizer, generator, scaler) -> tuple[int, list, torch.Tensor]:
    """Load what ``usable`` found, and return the updates done, the history and the running sums.

    If all ``total`` updates were done, only the network is loaded.
    """
    if found is None:
        return 0, [], torch.zeros(2, device=generator.device)
    meta, tensors = found
    net.load_state_dict(network_state(tensors))
    if int(meta["update"]) < total:
        load_optimiser(optimizer, tensors)
        scaler.load_state_dict(json.loads(meta["scaler"]))
        generator.set_state(tensors["generator"].cpu())
    return int(meta["update"]), json.loads(meta["history"]), tensors["sums"].to(generator.device)


def load_optimiser(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Load the optimiser's tensors of a checkpoint, each in its parameter's memory format."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = optimizer.state_dict()
    for key in (k for k in tensors if k.startswith("optimizer.")):
        _, i, name = key.split(".")
        parameter, value = parameters[int(i)], tensors[key]
        if value.shape == parameter.shape:  # not the count of steps
            value = torch.empty_like(parameter).copy_(value)
        state["state"].setdefault(int(i), {})[name] = value
    optimizer.load_state_dict(state)
