"""What the servers serve: model, profile, sizes, and the pool of KV memory."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eos_vllm import profiles
from eos_vllm.analysis.cost import DTYPE_BYTES
from eos_vllm.analysis.scaling import scale_to_model
from eos_vllm.core.budget import image_size
from eos_vllm.core.errors import EosError
from eos_vllm.core.profile import Profile, parse_profile
from eos_vllm.models.geometry import ModelGeometry, geometry
from loadtests.grid import Kind
from loadtests.servers import MODEL_NAME, GivenServers, Servers, ServerSpec, servers
from loadtests.sweep_options import SweepOptions

# vLLM keeps a block for itself, and the last one of a request is seldom full.
_SPARE_TOKENS = 256


@dataclass(frozen=True)
class Subject:
    """A model and a profile.

    Attributes:
        name: for people.
        model: directory; None where the servers are given.
        sizes: the model's; None where nobody knows them.
        profile: of the eos server; None as above.
        profile_name: what it was made from.
        parameters: of the model, where known.
    """

    name: str
    model: Path | None
    sizes: ModelGeometry | None
    profile: Profile | None
    profile_name: str = ""
    parameters: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the raw results."""
        return {
            "name": self.name,
            "parameters": self.parameters,
            "profile_name": self.profile_name,
            "geometry": None if self.sizes is None else asdict(self.sizes),
            "profile": None if self.profile is None else self.profile.to_dict(),
        }


def speed_subject(options: SweepOptions, folder: Path) -> Subject:
    """The model whose speed is measured, written into ``folder`` if it is a preset.

    Raises:
        EosError: unknown preset or profile, or one that does not fit the model.
    """
    if options.given:
        return Subject(options.model or options.served_name or "", None, None, None, options.profile)
    parameters = None
    if options.model is None:
        from eos_vllm.models.tiny import PRESETS, parameter_count, write_tiny_model

        if options.preset not in PRESETS:
            raise EosError("preset", options.preset, "is unknown", f"choose one of {', '.join(PRESETS)}")
        shape = PRESETS[options.preset]
        model = write_tiny_model(folder / "model", shape=shape)
        name, parameters = f"{options.preset}, random weights", parameter_count(shape)
    else:
        model = Path(options.model)
        name = model.name
    sizes = geometry(model if model.exists() else options.model)
    profile = fitted_profile(options.profile, sizes)
    return Subject(name, model, sizes, profile, profile_title(options.profile, profile), parameters)


def profile_title(source: str, fitted: Profile) -> str:
    """The profile's name for people; says so where it had to be scaled."""
    layers = profiles.resolve(source).model.num_decoder_layers
    name = Path(source).stem if source.endswith(".json") else source
    now = fitted.model.num_decoder_layers
    return name if layers == now else f"{name}, scaled from {layers} to {now} layers"


def fitted_profile(source: str, sizes: ModelGeometry) -> Profile:
    """The profile, scaled where it was made for another depth; budgets are counted by what is left in the end.

    ``final`` is the one measure that is defined for every budget, so that a sweep may go down to 1.

    Raises:
        EosError: there is no such profile, or it cannot be scaled.
    """
    profile = profiles.resolve(source)
    if (profile.model.num_decoder_layers, profile.model.visual_tokens) != (
        sizes.num_decoder_layers,
        sizes.visual_tokens,
    ):
        profile = scale_to_model(profile, sizes.num_decoder_layers, sizes.visual_tokens)
    budget = {"measure": "final", "tokens": min(64, image_size(profile)), "minimum": 1}
    return parse_profile(profile.to_dict() | {"budget": budget})


def pool_bytes(options: SweepOptions, sizes: ModelGeometry) -> int:
    """KV memory of each server in bytes: what was asked for, or room for every user's longest request in stock."""
    if options.kv_bytes is not None:
        return options.kv_bytes
    token = 2 * sizes.num_decoder_layers * sizes.num_kv_heads * sizes.head_dim * DTYPE_BYTES[options.dtype]
    return token * (options.kv_requests * options.max_model_len + _SPARE_TOKENS)


@contextmanager
def serving(
    options: SweepOptions,
    subject: Subject,
    environment: dict[str, str] | None = None,
    kinds: Sequence[Kind] = ("stock", "eos"),
) -> Iterator[tuple[Servers | GivenServers, str]]:
    """The servers, with further environment variables, and the name under which they serve.

    Raises:
        ServerError: one did not start.
        SettingError: one that was given does not answer.
    """
    if options.given:
        assert options.stock_url is not None
        assert options.eos_url is not None
        given = GivenServers(options.stock_url, options.eos_url)
        given.wait(options.wait)
        yield given, str(options.served_name)
        return
    with servers(server_spec(options, subject, environment), kinds, options.serial) as pair:
        yield pair, MODEL_NAME


def server_spec(options: SweepOptions, subject: Subject, environment: dict[str, str] | None = None) -> ServerSpec:
    """What the servers of a subject that we start ourselves have in common."""
    assert subject.profile is not None
    assert subject.sizes is not None
    return ServerSpec(
        model=str(subject.model),
        profile=subject.profile,
        kv_bytes=pool_bytes(options, subject.sizes),
        max_model_len=options.max_model_len,
        dtype=options.dtype,
        arguments=options.arguments(),
        environment=environment or {},
    )
