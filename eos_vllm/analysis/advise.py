"""The cheapest measured profile and budget that keeps an accuracy and lets so many requests fit: a pure function.

Accuracy is relative to all tokens on the same questions. It has to reach the floor with the lower end of its 95 %
interval, unless asked otherwise: of a hundred points the best means are the luckiest ones. Cheapest is what holds the
fewest bytes of KV for a request, prompt and answer in whole blocks; then fewest prefill FLOPs. A point is planned with
exact counts, as it was measured. For a model of another depth its profile is scaled, which says nothing of accuracy
there: that, and any speed, is told as it was measured, with where, and never carried over.
"""

import math
from dataclasses import dataclass

from eos_vllm.analysis.advice import GIB, Advice, By, Option, Speed, Wish, end_of
from eos_vllm.analysis.choices import Choices, Point
from eos_vllm.analysis.comparison import compare, held_reduced, held_stock
from eos_vllm.analysis.cost import Geometry, PromptCost
from eos_vllm.analysis.scaling import scale_to_model
from eos_vllm.core.errors import BudgetError, ProfileError, SettingError
from eos_vllm.core.plan import Planner
from eos_vllm.core.profile import Profile, check_fits


@dataclass(frozen=True)
class _Planned:
    point: Point
    profile: Profile
    planner: Planner
    budget: int


class Catalogue:
    """The measured points, planned for one model; made once, for reading profiles takes longer than planning."""

    def __init__(
        self, choices: Choices, geometry: Geometry, model: str, dtype: str = "float16", block_size: int = 16
    ) -> None:
        """Plans all points.

        Args:
            choices: the points.
            geometry: sizes of the model that is asked about.
            model: its name.
            dtype: of the KV cache.
            block_size: tokens per KV block.

        Raises:
            SettingError: a model whose images are of any size, for which nothing was measured.
        """
        if geometry.visual_tokens is None:
            problem = "its images have any number of tokens, and accuracy was measured on images of a fixed number only"
            raise SettingError("model", model, problem, "give a model such as llava-1.5-7b, or plan with eos-vllm plan")
        self.choices, self.geometry, self.model = choices, geometry, model
        self.dtype, self.block_size = dtype, block_size
        self.planned: list[_Planned] = []
        self.left_out: list[str] = []
        self.scaled: set[str] = set()
        for point in choices.points:
            try:
                self.planned.append(self._plan(point))
            except (ProfileError, BudgetError) as error:
                self.left_out.append(f"{point.profile} at {point.budget}: {error.problem}")

    def _plan(self, point: Point) -> _Planned:
        profile, budget = self.choices.profile(point), point.budget
        depth, visual = self.geometry.num_decoder_layers, self.geometry.visual_tokens
        assert visual is not None  # see above
        if (depth, visual) != (profile.model.num_decoder_layers, profile.model.visual_tokens):
            budget = max(1, math.floor(budget * visual / self.choices.visual_tokens + 0.5))
            profile = scale_to_model(profile, depth, visual)
            self.scaled.add(profile.name)
        check_fits(profile, self.geometry)
        planner = Planner(profile, budget)
        planner.counts()
        return _Planned(point, profile, planner, budget)

    @property
    def names(self) -> list[str]:
        """Profiles of the points, and shipped ones that are the same, as ``--profile`` takes them."""
        found = {p.profile for p in self.choices.points} | {p.shipped for p in self.choices.points if p.shipped}
        return sorted(found)

    def profile_of(self, option: Option) -> Profile:
        """The profile that an option was planned with."""
        wanted = (option.profile, option.budget, option.source)
        return next(p.profile for p in self.planned if (p.point.profile, p.budget, p.point.source) == wanted)

    def _costs(self, planned: _Planned, wish: Wish) -> tuple[int, int, int]:
        """Bytes that a request holds, its prefill FLOPs, and requests that fit."""

        def held(output_tokens: int) -> PromptCost:
            what = (wish.text_tokens, output_tokens, wish.images)
            return held_reduced(self.geometry, planned.planner, *what, dtype=self.dtype, block_size=self.block_size)

        ours = held(wish.output_tokens)
        prefill = held(0) if wish.output_tokens else ours
        return ours.allocated_bytes, prefill.flops, requests_fit(wish.kv_gib, ours)

    def advise(self, wish: Wish) -> Advice:
        """The cheapest point that keeps the floor and lets the requests fit.

        Raises:
            SettingError: a profile that nothing was measured of, or none that can be planned.
        """
        wanted = set(wish.profiles)
        if unknown := sorted(wanted - set(self.names)):
            known = ", ".join(self.names)
            raise SettingError("profile", unknown[0], "nothing was measured of it", f"give all, or some of {known}")
        taken = [p for p in self.planned if not wanted or wanted & {p.point.profile, p.point.shipped}]
        if not taken:
            problem = f"it cannot be planned for {self.model}: {'; '.join(self.left_out)}"
            raise SettingError("profile", ", ".join(sorted(wanted)) or "all", problem, "name another profile or model")
        ranked = sorted(
            ((p, self._costs(p, wish)) for p in taken),
            key=lambda item: (item[1][:2], -item[0].point.relative.low, item[0].point.profile, item[0].budget),
        )
        accurate = [item for item in ranked if _share(item[0].point, wish.by) >= wish.accuracy_floor]
        fitting = [item for item in ranked if item[1][2] >= wish.concurrency]
        chosen = next((item for item in accurate if item[1][2] >= wish.concurrency), None)
        nearest, misses = None, []
        if chosen is None and accurate:
            nearest = accurate[0]
            need = wish.concurrency * nearest[1][0] / GIB
            misses.append(
                f"memory: of what keeps the floor, the cheapest lets {nearest[1][2]} requests fit, "
                f"{wish.concurrency} are wanted: they hold {need:.3g} GiB"
            )
        elif chosen is None:
            # Of what fits, if anything does, what comes closest to the floor.
            nearest = max(fitting or ranked, key=lambda item: _share(item[0].point, wish.by))
            best = max(_share(item[0].point, wish.by) for item in ranked)
            misses.append(
                f"accuracy: no profile and budget keeps {wish.accuracy_floor:.4g} of all tokens' ({end_of(wish.by)}); "
                f"the most is {best:.4g}"
            )
            if not fitting:
                misses.append(f"memory: none lets {wish.concurrency} requests fit in {wish.kv_gib:g} GiB")
        shown = chosen or nearest
        assert shown is not None  # one of the points
        stock = held_stock(
            *(self.geometry, self.geometry.visual_tokens or 0, wish.text_tokens, wish.output_tokens, wish.images),
            dtype=self.dtype,
            block_size=self.block_size,
        )
        option = self._option(*shown, stock, wish)
        return Advice(
            choice=None if chosen is None else option,
            nearest=None if chosen is not None else option,
            misses=misses,
            warnings=self._warnings(option),
            accuracy_floor=wish.accuracy_floor,
            by=wish.by,
            stock_requests_fit=option.stock_requests_fit,
            stock_kv_bytes=stock.allocated_bytes,
            considered=len(taken),
            left_out=self.left_out,
        )

    def _option(self, planned: _Planned, costs: tuple[int, int, int], stock: PromptCost, wish: Wish) -> Option:
        point = planned.point
        plan = compare(
            *(self.geometry, planned.planner, wish.text_tokens, wish.images),
            dtype=self.dtype,
            block_size=self.block_size,
        )
        origin, speed = self.choices.origin_of(point), None
        if point.stock_ratio is not None and point.stock_ratio_range and point.requests_per_second:
            speed = Speed(
                stock_ratio=point.stock_ratio,
                stock_ratio_range=point.stock_ratio_range,
                requests_per_second=point.requests_per_second,
                measured=f"{point.model} in offline vLLM, exact counts (machines and revisions: measured_at in "
                f"{point.source})",
                revisions=origin.measured_at,
            )
        return Option(
            profile=point.profile,
            shipped=point.shipped,
            budget=planned.budget,
            measure=point.measure,
            scaled=planned.profile.name in self.scaled,
            rounds=bool(planned.profile.inside),
            counts=list(plan.counts),
            layer_average=plan.layer_average,
            kv_bytes=costs[0],
            prefill_flops=plan.reduced.flops,
            requests_fit=costs[2],
            stock_requests_fit=requests_fit(wish.kv_gib, stock),
            relative=point.relative,
            accuracy=point.accuracy,
            speed=speed,
            model=point.model,
            source=point.source,
            about=origin.about,
        )

    def _warnings(self, option: Option) -> list[str]:
        found = []
        if self.model != option.model:
            found.append(
                f"accuracy and speed were measured on {option.model} ({self.choices.visual_tokens} visual tokens), not "
                f"on {self.model}: what {self.model} answers, nobody has measured"
            )
        if option.scaled:
            found.append(f"the profile was scaled to {self.geometry.num_decoder_layers} layers: a place to start from")
        if option.speed is not None and option.speed.stock_ratio < 1:
            found.append(f"it was slower than stock where it was measured ({option.speed.stock_ratio:.2f} times)")
        return found


def _share(point: Point, by: By) -> float:
    return point.relative.low if by == "low" else point.relative.mean


def requests_fit(kv_gib: float, request: PromptCost) -> int:
    """Requests that a KV cache holds at once; one block of it is vLLM's own null block."""
    return max(0, (int(kv_gib * GIB) // request.block_bytes - 1) // request.blocks)
