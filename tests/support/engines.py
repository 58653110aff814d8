"""In-process vLLM engines for tests: start, look into, drive step by step, and clean up."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from eos_vllm.core.budget import REQUEST_FIELD
from eos_vllm.core.plan import RequestPlan
from eos_vllm.core.profile import Profile
from eos_vllm.models.images import sample_image


@dataclass
class Ask:
    """One request of a test."""

    prompt: str
    images: list[Image.Image] = field(default_factory=list)
    budget: int | None = None
    max_tokens: int = 34


@dataclass
class Answer:
    token_ids: list[int]
    first_logprobs: dict[int, float]
    prompt_tokens: int = 0
    cached_tokens: int = 0


@contextmanager
def engine(
    model: Any, profile: Profile | None, retain: int | None = None, page: bool = False, **settings: Any
) -> Iterator[Any]:
    """A ``vllm.LLM`` in this process; float32, eager. ``page`` turns traces on."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    arguments: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 2048,
        "kv_cache_memory_bytes": 64 << 20,
        "block_size": 32,
        "limit_mm_per_prompt": {"image": 2},
        "enable_prefix_caching": False,
        **settings,
    }
    if profile is not None:
        if "enable_prefix_caching" not in settings:
            del arguments["enable_prefix_caching"]
        arguments["additional_config"] = {"eos": {"profile": profile.to_dict(), "retain": retain, "page": page}}
    llm = LLM(str(model), **arguments)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def scheduler_of(llm: Any) -> Any:
    """The scheduler of an in-process engine."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def marker_of(llm: Any) -> list[int]:
    """Tokens of the generation prompt that the engine found in the chat template."""
    return list(llm.llm_engine.vllm_config.additional_config["eos"]["marker"] or ())


def free_blocks(llm: Any) -> int:
    """Blocks of the KV pool that no request holds."""
    return scheduler_of(llm).kv_cache_manager.block_pool.get_num_free_blocks()


def params_of(ask: Ask, **extra_args: Any) -> Any:
    """Greedy sampling parameters with the five best log-probabilities, and the request's budget if it names one."""
    from vllm import SamplingParams

    extra = extra_args if ask.budget is None else {REQUEST_FIELD: ask.budget, **extra_args}
    extra = extra or None
    return SamplingParams(temperature=0, max_tokens=ask.max_tokens, ignore_eos=True, logprobs=5, extra_args=extra)


def prompt_of(ask: Ask) -> dict[str, Any]:
    """vLLM's form of a prompt."""
    return {"prompt": ask.prompt} | ({"multi_modal_data": {"image": ask.images}} if ask.images else {})


def answer_all(llm: Any, asks: list[Ask]) -> list[Answer]:
    """All answers of one call, so that requests share batches."""
    outputs = llm.generate([prompt_of(a) for a in asks], [params_of(a) for a in asks], use_tqdm=False)
    return [
        Answer(
            list(out.outputs[0].token_ids),
            {token: value.logprob for token, value in out.outputs[0].logprobs[0].items()},
            len(out.prompt_token_ids),
            out.num_cached_tokens or 0,
        )
        for out in outputs
    ]


@dataclass
class BlockWatch:
    """Holds, at every step of an engine, the blocks of each request and KV group against its plan."""

    scheduler: Any
    checks: int = 0
    reduced: int = 0
    mixed_steps: int = 0
    preemptions: int = 0
    reduced_preemptions: int = 0
    errors: list[str] = field(default_factory=list)
    hit_tokens: list[list[int]] = field(default_factory=list)  # of each look-up that found something, by KV group

    def __enter__(self) -> "BlockWatch":
        self._schedule, self._preempt = self.scheduler.schedule, self.scheduler._preempt_request
        self.scheduler.schedule, self.scheduler._preempt_request = self._watched, self._counted
        self._find = self.scheduler.coordinator.find_longest_cache_hit
        self.scheduler.coordinator.find_longest_cache_hit = self._looked_up
        return self

    def __exit__(self, *_: object) -> None:
        self.scheduler.schedule, self.scheduler._preempt_request = self._schedule, self._preempt
        self.scheduler.coordinator.find_longest_cache_hit = self._find

    def _looked_up(self, *args: Any, **kwargs: Any) -> Any:
        blocks, end, external = self._find(*args, **kwargs)
        keys = self.scheduler.coordinator.looked_up
        if end and keys is not None:
            managers = self.scheduler.coordinator.single_type_managers
            tokens = [keys.plan.segment_length(m.kv_cache_spec.segment, end) if keys.plan else end for m in managers]
            self.hit_tokens.append(tokens)
            want = [-(-count // m.block_size) for count, m in zip(tokens, managers, strict=True)]
            if want != (have := [len(group) for group in blocks]):
                self.errors.append(f"a hit of {end} tokens: {have} blocks by KV group, planned {want}")
        return blocks, end, external

    def _counted(self, *args: Any, **kwargs: Any) -> Any:
        request = args[0]
        self.preemptions += 1
        self.reduced_preemptions += request.request_id in self.scheduler.plans and request.num_output_tokens > 0
        return self._preempt(*args, **kwargs)

    def _watched(self, *args: Any, **kwargs: Any) -> Any:
        output = self._schedule(*args, **kwargs)
        plans, counts = self.scheduler.plans, output.num_scheduled_tokens
        reducing = [data.req_id in plans for data in output.scheduled_new_reqs]
        self.mixed_steps += any(reducing) and min(counts.values()) == 1
        managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        for request in self.scheduler.running:
            plan: RequestPlan | None = self.scheduler.plans.get(request.request_id)
            for manager in managers:
                spec = manager.kv_cache_spec
                tokens = request.num_computed_tokens
                length = plan.segment_length(spec.segment, tokens) if plan else tokens
                want = -(-length // spec.block_size)
                have = len(manager.req_to_blocks[request.request_id])
                self.checks += 1
                self.reduced += length < tokens
                if have != want:
                    self.errors.append(f"{request.request_id} segment {spec.segment}: holds {have}, planned {want}")
        return output


def mixed_asks(count: int = 26) -> list[Ask]:
    """Text only, one and two images, several lengths of question, and other budgets, in turn."""
    budgets = [None, 16, None, 192, 64, 576, None, 300, 1000]
    asks = []
    for i in range(count):
        question = "What is it? " * (1 + i % 4) + f"Number {i}."
        images = [sample_image(10 * i + j) for j in range(i % 3)]
        text = [
            f"USER: {question} ASSISTANT:",
            f"USER: <image>\n{question} ASSISTANT:",
            f"USER: <image>\nFirst, and <image>\n{question} ASSISTANT:",
        ][i % 3]
        asks.append(Ask(text, images, budgets[i % len(budgets)] if images else None, max_tokens=33 + i % 5))
    return asks
