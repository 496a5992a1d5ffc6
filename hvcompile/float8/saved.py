"""A model with float8 weights as files, and such a model loaded again, without the weights that these were made from.

A directory holds ``model.safetensors``, with the float8 matrices and their scales and all other tensors of the model,
and ``manifest.json``, which says what they are. Loading maps the file into memory: nothing is copied, quantised or held
twice, and the original weights are never there.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hvcompile.errors import InputError, OutputError, QuantizedWeightError
from hvcompile.float8 import tensor_file
from hvcompile.float8.weights import Joined, LoadedWeight, QuantizedWeight
from hvcompile.hollow.parameter import hollow_like, refuse_values
from hvcompile.torch_private.dynamo import compiled_module
from hvcompile.version import version_of

FORMAT = 1
MANIFEST, TENSORS = "manifest.json", "model.safetensors"


def save_float8(model: nn.Module | Callable[..., Any], directory: str | Path) -> Path:
    """Write a model whose weights hvfast keeps in float8, to be loaded by ``load_float8``.

    Args:
        model: that has run once under ``backend="hvfast"`` with ``fp8``; or what ``torch.compile`` made of it.
        directory: made if missing. Files of an earlier save are replaced once the new ones are whole; who has loaded
            them keeps what they were.

    Returns:
        The directory.

    Raises:
        InputError: no weight of the model is in float8, or it carries adapters.
        OutputError: the files can't be written.

    """
    module = _module(model)
    place = Path(directory)
    tensors, manifest = _described(module)
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".hvcompile-", dir=place) as directory_of_parts:
            parts = Path(directory_of_parts)
            tensor_file.write(tensors, parts / TENSORS)
            manifest |= {"bytes": (parts / TENSORS).stat().st_size, "sha256": _sha256(parts / TENSORS)}
            manifest["digest"] = digest_of(manifest)
            (parts / MANIFEST).write_text(json.dumps(manifest, indent=1))
            # Not written in place: a file of that name may be mapped into memory, or be a link to one of others.
            for name in (TENSORS, MANIFEST):
                (parts / name).replace(place / name)
    except OSError as error:
        raise OutputError(f"the float8 model can't be written to {place}: {error}") from error
    return place


def load_float8(
    directory: str | Path, model: nn.Module | None = None, *, device: str | torch.device = "cpu", check: bool = True
) -> nn.Module:
    """Load a model that ``save_float8`` wrote; it never holds the weights that the float8 ones were made from.

    Compile it with ``backend="hvfast"`` before you call it, and with the options of the saved one. It computes to the
    last bit what that did, and its journal says where its weights come from. ``hvcompile.restore`` has nothing to bring
    back, and is an error.

    Args:
        directory: of the files.
        model: of the same class and configuration, on the meta device for instance; its parameters are replaced. None
            makes one, which takes a class of diffusers.
        device: where the weights go.
        check: whether the file is compared with its checksum, which reads it once.

    Raises:
        InputError: a file is missing, damaged or of another version, or is of another model; before any weight is
            loaded.
        ImportError: safetensors is not installed.

    """
    place = Path(directory)
    manifest = _read_manifest(place)
    _check_file(place, manifest, has_checksum=check)
    module = _empty(place, manifest) if model is None else _module(model)
    _check_model(place, manifest, module)
    from safetensors import safe_open

    with safe_open(place / TENSORS, framework="pt", device=str(device)) as file:
        names = {name for name in file.keys() if not name.startswith(tensor_file.FILLER)}  # noqa: SIM118
        wanted = {*manifest["tensors"], *(name for group in manifest["float8"] for name in _names(group))}
        if names != wanted:
            raise InputError(f"{place / TENSORS} does not hold what {MANIFEST} lists: {_differing(names, wanted)}")
        for name in manifest["tensors"]:
            _put(module, name, file.get_tensor(name))
        for group in manifest["float8"]:
            data, scale = map(file.get_tensor, _names(group))
            joined = Joined(data, scale, group["granularity"])
            for part in group["weights"]:
                if part["start"] + part["shape"][0] > data.shape[0] or part["shape"][1] != data.shape[1]:
                    raise InputError(f"{place / MANIFEST} is damaged: {part['name']} is no part of its matrix")
                _put_float8(module, part, joined, place)
    for name, other in manifest["tied"].items():
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, _held(module)[other])
    return module.requires_grad_(False).eval()


def source_of(weight: QuantizedWeight) -> str:
    """The directory that a weight was loaded from; empty where it was quantised in this process."""
    return str(vars(weight).get("loaded_from", ""))


def refuse_to_restore(module: nn.Module) -> None:
    """Raise where a module's weights were loaded in float8, so that there is nothing to bring back.

    Raises:
        QuantizedWeightError: names the directory.

    """
    for name, weight in module.named_parameters():
        if isinstance(weight, QuantizedWeight) and source_of(weight):
            raise QuantizedWeightError(
                f"{name} was loaded in float8 from {source_of(weight)}, and what that was made from was never here: "
                "load the original checkpoint instead of restoring it"
            )


def _module(model: Any) -> nn.Module:
    module = compiled_module(model)
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, or what torch.compile made of it, got {type(model).__name__}")
    return module


def _held(module: nn.Module) -> dict[str, Any]:
    """The parameters and the buffers that are saved, by name; tied ones under each of their names."""
    return {name: item for name, item in module.state_dict(keep_vars=True).items() if isinstance(item, torch.Tensor)}


def _described(module: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What goes into the files."""
    if getattr(module, "peft_config", None):
        raise InputError("the model carries adapters: unload or fuse them before its float8 weights are saved")
    names: dict[int, str] = {}
    tied: dict[str, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, Any] = {}
    groups: dict[int, tuple[Joined, list[dict[str, Any]]]] = {}
    for name, tensor in _held(module).items():
        if id(tensor) in names:
            tied[name] = names[id(tensor)]
            continue
        names[id(tensor)] = name
        if isinstance(tensor, QuantizedWeight):
            part = {"name": name, "shape": list(tensor.shape), "dtype": _dtype(tensor), "start": tensor.start}
            groups.setdefault(id(tensor.joined), (tensor.joined, []))[1].append(part)
        else:
            tensors[name] = tensor
            plain[name] = {"shape": list(tensor.shape), "dtype": _dtype(tensor)}
    if not groups:
        raise InputError(
            f"no weight of this {type(module).__name__} is in float8: compile it with backend='hvfast' and "
            "options={'fp8': True}, and call it once"
        )
    listed = []
    for number, (joined, parts) in enumerate(groups.values()):
        group = {"number": number, "granularity": joined.granularity, "weights": parts}
        tensors |= dict(zip(_names(group), (joined.data, joined.scale), strict=True))
        listed.append(group)
    manifest = {
        "format": FORMAT,
        "model": type(module).__name__,
        "config": _config(module),
        "float8": listed,
        "tensors": plain,
        "tied": tied,
        "versions": {package: version_of(package) for package in ("hvcompile", "torch", "torchao", "diffusers")},
    }
    return tensors, manifest


def _names(group: Mapping[str, Any]) -> tuple[str, str]:
    return f"float8.{group['number']}.data", f"float8.{group['number']}.scale"


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _config(module: nn.Module) -> Any:
    """The configuration of a model of diffusers; None for others."""
    write: Any = getattr(module, "to_json_string", None)
    return json.loads(write()) if write is not None else None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_of(manifest: Mapping[str, Any]) -> str:
    """The SHA-256 of all that a manifest says but its own digest."""
    content = {name: item for name, item in manifest.items() if name != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_manifest(place: Path) -> dict[str, Any]:
    file = place / MANIFEST
    try:
        manifest = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{file} can't be read ({error}): give the directory that hvcompile.save_float8 wrote"
        ) from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise InputError(f"{file} is of format {found!r}, and this hvcompile reads {FORMAT}: save the model again")
    lacking = {"digest", "bytes", "sha256", "model", "config", "float8", "tensors", "tied"} - manifest.keys()
    if lacking:
        raise InputError(f"{file} lacks {', '.join(sorted(lacking))}: it is damaged, save the model again")
    if manifest["digest"] != digest_of(manifest):  # rows of one weight for another's would compute, and wrongly
        raise InputError(f"{file} is damaged: its digest is another than that of what it says. Copy or save it again")
    return manifest  # type: ignore[no-any-return]


def _check_file(place: Path, manifest: Mapping[str, Any], *, has_checksum: bool) -> None:
    file = place / TENSORS
    if not file.is_file():
        raise InputError(f"{file} is not there: {MANIFEST} beside it says that it should be")
    size = file.stat().st_size
    if size != manifest["bytes"]:
        raise InputError(
            f"{file} has {size} bytes, and should have {manifest['bytes']}: it is cut off or of another save"
        )
    if has_checksum and _sha256(file) != manifest["sha256"]:
        raise InputError(f"{file} is damaged: its SHA-256 is another than {MANIFEST} says. Copy or save it again")


def _empty(place: Path, manifest: Mapping[str, Any]) -> nn.Module:
    """A model of diffusers without weights."""
    import diffusers
    from accelerate import init_empty_weights

    kind: Any = getattr(diffusers, manifest["model"], None)
    if kind is None or manifest["config"] is None:
        raise InputError(
            f"{place} is of a {manifest['model']}, which is no model of diffusers: give one as model, made within "
            "torch.device('meta')"
        )
    with init_empty_weights():
        module: nn.Module = kind.from_config(manifest["config"])
    return module


def _check_model(place: Path, manifest: Mapping[str, Any], module: nn.Module) -> None:
    """Raise where a model has not the weights that were saved."""
    if type(module).__name__ != manifest["model"]:
        raise InputError(f"{place} is of a {manifest['model']}, not of a {type(module).__name__}")
    parts = {part["name"]: part for group in manifest["float8"] for part in group["weights"]}
    saved = {**manifest["tensors"], **parts}
    held = _held(module)
    if held.keys() != saved.keys() | manifest["tied"].keys():
        raise InputError(f"{place} is of another model: {_differing(set(saved) | set(manifest['tied']), set(held))}")
    for name, entry in saved.items():
        if list(held[name].shape) != entry["shape"]:
            there, here = tuple(entry["shape"]), tuple(held[name].shape)
            raise InputError(f"{place} is of another model: {name} is {there} there, and {here} here")
    differing = _differing_settings(manifest["config"], _config(module))
    if differing:
        raise InputError(f"{place} is of a model of another configuration: {differing}")
    homeless = [name for name, item in module.named_buffers() if item.is_meta and name not in held]
    if homeless:
        raise InputError(
            f"{homeless[0]} is made by the model itself, and is on the meta device: make the model within "
            "accelerate.init_empty_weights(), which leaves buffers their values"
        )


def _differing_settings(saved: Any, own: Any) -> str:
    """The first setting that two configurations have otherwise; empty where there is none, or one has none."""
    for name in saved or () if own else ():
        if not name.startswith("_") and saved[name] != own.get(name):
            return f"{name} is {saved[name]!r} there, and {own.get(name)!r} here"
    return ""


def _differing(given: set[str], wanted: set[str]) -> str:
    more, less = sorted(given - wanted), sorted(wanted - given)
    said = [f"it has {more[0]} and {len(more) - 1} more beyond"] if more else []
    return ", ".join(said + ([f"it lacks {less[0]} and {len(less) - 1} more"] if less else []))


def _put(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    part = module.get_submodule(owner)
    is_parameter = isinstance(getattr(part, attribute), nn.Parameter)
    setattr(part, attribute, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


def _put_float8(module: nn.Module, part: Mapping[str, Any], joined: Joined, place: Path) -> None:
    owner, _, attribute = part["name"].rpartition(".")
    dtype = getattr(torch, part["dtype"])
    weight: Any = nn.Parameter(torch.empty(0, dtype=dtype, device=joined.data.device), requires_grad=False)
    weight.data = hollow_like(torch.empty(part["shape"], dtype=dtype, device="meta"), joined.data.device)
    refuse_values(weight, part["name"], LoadedWeight)
    weight.joined, weight.start, weight.original, weight.loaded_from = joined, part["start"], None, str(place)
    setattr(module.get_submodule(owner), attribute, weight)
