"""What the servers of each phase serve: model, profile, sizes, and the pool of KV memory."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eos_vllm import profiles
from eos_vllm.core.errors import EosError
from eos_vllm.core.profile import Profile, parse_profile
from eos_vllm.core.scaling import scale_to_model
from eos_vllm.models.geometry import ModelGeometry, geometry
from loadtests.promise import promise
from loadtests.servers import MODEL_NAME, GivenServers, Servers, ServerSpec, servers
from loadtests.sweep_options import ACCURACY, SweepOptions

# What LLaVA's template adds to a question, for the size of the KV cache; the report counts what servers counted.
_TEMPLATE_TOKENS = 19
_TEXT_TOKENS = 88
_ROOM = 1.25
_ACCURACY_KV = 128 << 20


@dataclass(frozen=True)
class Subject:
    """A model and a profile.

    Attributes:
        name: for people.
        model: directory; None where the servers are given.
        sizes: the model's; None where nobody knows them, and then the plan cannot be held against figures.
        profile: of the eos server; None as above.
        parameters: of the model, where known.
    """

    name: str
    model: Path | None
    sizes: ModelGeometry | None
    profile: Profile | None
    parameters: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the raw results."""
        return {
            "name": self.name,
            "parameters": self.parameters,
            "geometry": None if self.sizes is None else asdict(self.sizes),
            "profile": None if self.profile is None else self.profile.to_dict(),
        }


def speed_subject(options: SweepOptions, folder: Path) -> Subject:
    """The model whose speed is measured, written into ``folder`` if it is a preset.

    Raises:
        EosError: unknown preset or profile, or one that does not fit the model.
    """
    if options.given and options.model is None:
        return Subject(options.served_name or "", None, None, None)
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
    return Subject(name, model, sizes, fitted_profile(options.profile, sizes), parameters)


def accuracy_subject(options: SweepOptions) -> Subject:
    """The embedded model, whose answers are worth counting.

    Raises:
        EosError: it is not in this installation.
    """
    from eos_vllm.models import embedded

    model = embedded.path()
    sizes = geometry(model)
    return Subject("embedded model", model, sizes, fitted_profile(options.accuracy_profile, sizes))


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
    budget = {"measure": "final", "tokens": min(64, sizes.visual_tokens), "minimum": 1}
    return parse_profile(profile.to_dict() | {"budget": budget})


def pool_bytes(options: SweepOptions, phase: str, subject: Subject) -> int:
    """KV memory of each server: a few stock requests where it shall bind, room for all where it shall not."""
    if phase in options.kv_bytes:
        return options.kv_bytes[phase]
    if phase == ACCURACY:
        return _ACCURACY_KV
    assert subject.sizes is not None
    assert subject.profile is not None
    text = _TEXT_TOKENS if options.prompt_characters is None else options.prompt_characters + _TEMPLATE_TOKENS
    held = promise(subject.sizes, subject.profile, None, text, options.output_tokens, options.dtype, options.block_size)
    most = max(load.requests if load.rate is not None else load.concurrency for load in options.loads)
    wanted = options.bound_requests if phase == "bound" else _ROOM * most
    # vLLM starts only where one request of full length fits, and keeps a block for itself.
    longest = math.ceil(options.max_model_len / options.block_size)
    blocks = max(math.ceil(wanted * held.blocks), longest) + 1
    return blocks * held.block_bytes


@contextmanager
def serving(
    options: SweepOptions, phase: str, subject: Subject, environment: dict[str, str] | None = None
) -> Iterator[tuple[Servers | GivenServers, str]]:
    """The servers of a phase, with further environment variables, and the name under which they serve.

    Raises:
        ServerError: one did not start.
    """
    if options.given:
        assert options.stock_url is not None
        assert options.eos_url is not None
        yield GivenServers(options.stock_url, options.eos_url), str(options.served_name)
        return
    assert subject.profile is not None
    spec = ServerSpec(
        model=str(subject.model),
        profile=subject.profile,
        kv_bytes=pool_bytes(options, phase, subject),
        max_model_len=options.max_model_len,
        max_num_batched_tokens=options.max_num_batched_tokens,
        block_size=options.block_size,
        images=1 if set(options.scenarios) <= {"single", "several", "text_only"} else 2,
        arguments=options.arguments(),
        environment=environment or {},
    )
    with servers(spec, options.serial) as pair:
        yield pair, MODEL_NAME
