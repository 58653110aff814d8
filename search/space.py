"""From settings and a model to what is searched: objective, rules, and the start of Theta."""

from eos_search.objective import Objective
from eos_search.selectors import named_selector
from eos_search.settings import SearchSettings
from eos_search.structure import Rules, acting_of, unmet_budget
from eos_search.theta import GATE_OFF, GATE_ON, Ranges, Theta, default_placement, start_values
from eos_vllm.core.errors import SettingError
from eos_vllm.core.profile import ImportanceSpec, ModelSpec, OperatorSpec


def search_space(settings: SearchSettings, spec: ModelSpec) -> tuple[Objective, Rules, Theta]:
    """Objective, rules and the start of Theta for a model.

    Raises:
        SettingError: a setting that doesn't fit the model.
    """
    depth, visual = spec.num_decoder_layers, spec.visual_tokens
    assert visual is not None  # images of any size are refused with the model
    places = depth - 1 if settings.withdraw is None else settings.withdraw
    layers = settings.align_layers
    if layers is None:
        layers = tuple(range(4, depth, 4)) or (depth - 1,)
    selector = named_selector(settings.select)
    _check_budgets(settings, depth, visual)
    _check_layers(settings, depth, places, layers)
    _check_together(settings)
    placement = settings.placement or default_placement(depth, settings.max_reducers)
    start = start_values(
        settings.start,
        depth,
        visual,
        settings.start_budget or settings.budget,
        settings.max_reducers,
        placement,
        settings.budget_measure,
        settings.gate_on,
        settings.gate_off,
        spec.flops_crossover,
        before=selector is not None,
        withdraw=settings.withdraw,
    )
    ranges = Ranges(settings.gate_scale, settings.discard_scale, settings.epsilon)
    theta = Theta.from_values(start, ranges, settings.gate_scale_start, selector is not None, places)
    objective = Objective(
        budget=settings.budget,
        max_reducers=settings.max_reducers,
        visual_tokens=visual,
        align_layers=layers,
        align_on=settings.align_on,
        lambda_align=settings.lambda_align,
        lambda_budget=settings.lambda_budget,
        lambda_cost=settings.lambda_cost,
        cross_entropy=settings.cross_entropy,
        budget_measure=settings.budget_measure,
        budget_gates=settings.budget_gates,
        crossover=spec.flops_crossover,
        lambda_kl=settings.lambda_kl,
        withdraw=settings.withdraw,
    )
    rules = Rules(
        model=spec,
        importance=ImportanceSpec(queries=settings.queries),
        operator=OperatorSpec(gate_sharpness=settings.gate_sharpness, norm=settings.norm),
        max_reducers=settings.max_reducers,
        gate_threshold=settings.gate_threshold,
        minimum=settings.minimum,
        select=selector,
        withdraw=settings.withdraw,
        measure=settings.budget_measure,
    )
    _check_served(settings, theta, rules)
    return objective, rules, theta


def _check_served(settings: SearchSettings, theta: Theta, rules: Rules) -> None:
    start = theta()
    if (budget := unmet_budget(start, rules, settings.serve_budgets)) is not None:
        at = ", ".join(map(str, acting_of(start, rules)))
        problem = f"reducers at layers {at} that leave {rules.minimum} at least cannot have it"
        raise SettingError("serve_budgets", budget, problem, "leave it out, or place reducers earlier")


def _check_budgets(settings: SearchSettings, depth: int, visual: int) -> None:
    for name in ("budget", "start_budget"):
        if (tokens := getattr(settings, name)) is not None and tokens > visual:
            raise SettingError(name, tokens, f"an image has {visual} visual tokens", f"give 1 to {visual}")
    if settings.minimum > settings.budget:
        remedy = f"give 1 to {settings.budget}"
        raise SettingError("minimum", settings.minimum, f"the budget of {settings.budget} is less", remedy)
    least = visual / depth
    if settings.budget_measure in ("layer_average", "kv_bytes") and settings.select is None:
        below = [budget for budget in settings.serve_budgets if budget <= least]
        if below:
            problem = f"layer 0 alone sees {visual} tokens, which is {least:.1f} as a mean over layers"
            raise SettingError("serve_budgets", below[0], problem, "leave it out, or select before the decoder")


def _check_layers(settings: SearchSettings, depth: int, places: int, align: tuple[int, ...]) -> None:
    if settings.withdraw is not None and settings.withdraw > depth - 2:
        problem = f"of {depth} layers, {depth - 2} is the last with any behind it to save"
        raise SettingError("withdraw", settings.withdraw, problem, f"give 1 to {depth - 2}")
    if settings.max_reducers > places:
        problem = f"a model of {depth} layers has {places} places for reducers"
        if settings.withdraw is not None:
            problem += f" in front of layer {settings.withdraw}, which withdraws"
        raise SettingError("max_reducers", settings.max_reducers, problem, f"give 1 to {places}")
    if not align or min(align) < 0 or max(align) >= depth or len(set(align)) < len(align):
        problem, remedy = f"the model has layers 0 to {depth - 1}", "give some of them, each once"
        raise SettingError("align_layers", list(align), problem, remedy)
    if settings.align_on != "visual":
        return
    if settings.select is not None:
        problem = "visual states behind a selection have no counterpart in the unreduced model"
        raise SettingError("align_on", settings.align_on, problem, "align text, or select nothing")
    hidden = [layer for layer in align if settings.withdraw is not None and layer >= settings.withdraw]
    if hidden and settings.lambda_align > 0:
        problem = f"behind layer {settings.withdraw} there are no visual states"
        raise SettingError("align_layers", list(align), problem, f"leave out {', '.join(map(str, hidden))}")


def _check_together(settings: SearchSettings) -> None:
    """What goes together, whatever the model."""
    if settings.queries == "image":
        raise SettingError("queries", settings.queries, "the search needs text that asks", "choose a rule of text")
    if settings.fit_rows and not settings.serve_budgets:
        problem = "there is no served budget to choose counts at"
        raise SettingError("fit_rows", settings.fit_rows, problem, "give serve_budgets, or leave it out")
    if not settings.cross_entropy and settings.lambda_align == 0 and settings.lambda_kl == 0:
        remedy = "give lambda_align or lambda_kl above 0, or turn cross_entropy on"
        raise SettingError("cross_entropy", False, "without the alignment nothing is left to learn from", remedy)
    if settings.constraint == "lagrangian" and "discard" in settings.frozen:
        problem, remedy = "frozen discards cannot be moved to meet a budget", "let discard learn, or take penalty"
        raise SettingError("constraint", settings.constraint, problem, remedy)
    if unserved := [budget for budget in settings.fit_budgets if budget not in settings.serve_budgets]:
        remedy = f"choose from {', '.join(map(str, settings.serve_budgets)) or 'those that serve_budgets names'}"
        raise SettingError("fit_budgets", unserved[0], "is no served budget", remedy)
    changed = settings.gate_on != GATE_ON or settings.gate_off != GATE_OFF
    if changed and not settings.gate_off < settings.gate_threshold < settings.gate_on:
        problem = f"gate_off={settings.gate_off} < gate_threshold={settings.gate_threshold} < gate_on does not hold"
        raise SettingError("gate_on", settings.gate_on, problem, "give gates on either side of the threshold")
