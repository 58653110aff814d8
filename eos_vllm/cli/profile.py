"""`eos-vllm profile`: list, show, validate, rescale and scale operator profiles, and print their JSON schema."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from eos_vllm import profiles
from eos_vllm.analysis.scaling import rescale, scale_to_model, upgrade
from eos_vllm.core.budget import kept_counts, measures, own_budget, parse_budget
from eos_vllm.core.errors import EosError, SettingError
from eos_vllm.core.profile import Profile, Withdrawal, profile_digest, read_profile

_SOURCE = "a profile file, or a name of `profile list`"

# Visual tokens of an image for which counts are shown, where a profile takes images of any size.
_SHOWN = 1000


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand `profile` and its own subcommands to the `eos-vllm` command."""
    parser = subparsers.add_parser(
        "profile",
        help="list, show, validate, rescale and scale operator profiles",
        description="Work with operator profiles (theta.json, schema eos-profile/2).",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    action = actions.add_parser("list", help="names of the shipped profiles")
    action.set_defaults(run=run_list)

    action = actions.add_parser("show", help="reducers, kept counts and where a profile comes from")
    action.add_argument("source", metavar="FILE|NAME", help=_SOURCE)
    action.add_argument("--retain", metavar="N", help="retain budget (default: the profile's own)")
    action.set_defaults(run=run_show)

    action = actions.add_parser("validate", help="check files; exit code 2 if any is invalid")
    action.add_argument("files", nargs="+", metavar="FILE")
    action.set_defaults(run=run_validate)

    action = actions.add_parser("rescale", help="the same layers and operators for another budget (paper 2.6)")
    action.add_argument("source", metavar="FILE|NAME", help=_SOURCE)
    action.add_argument("--retain", required=True, metavar="N", help="retain budget, by the profile's own measure")
    action.add_argument("--out", required=True, type=Path, metavar="FILE", help="file to write")
    action.set_defaults(run=run_rescale)

    action = actions.add_parser("scale", help="adapt a profile to a model of another depth or other visual tokens")
    action.add_argument("source", metavar="FILE|NAME", help=_SOURCE)
    action.add_argument("--layers", required=True, type=int, metavar="N", help="decoder layers of the other model")
    action.add_argument("--visual-tokens", type=int, metavar="N", help="its visual tokens (default: the profile's)")
    action.add_argument("--name", help="name of the new profile")
    action.add_argument("--out", type=Path, metavar="FILE", help="file to write (default: standard output)")
    action.set_defaults(run=run_scale)

    action = actions.add_parser("upgrade", help="write a profile as eos-profile/2, with the meaning that it has")
    action.add_argument("source", metavar="FILE|NAME", help=_SOURCE)
    action.add_argument("--window", choices=("prompt", "turn"), help="another window than the profile's (default: its)")
    action.add_argument("--out", type=Path, metavar="FILE", help="file to write (default: standard output)")
    action.set_defaults(run=run_upgrade)

    action = actions.add_parser("schema", help="print the JSON schema of eos-profile/2 (and /1)")
    action.set_defaults(run=run_schema)


def run_list(_args: argparse.Namespace) -> int:
    """Print each shipped profile with its model, reducers and budget; return 0."""
    width = max(map(len, profiles.names()))
    for name in profiles.names():
        profile = profiles.load(name)
        budget = f"{own_budget(profile)} by {profile.budget.measure}"
        print(f"{name:<{width}}  {_model(profile)}; {where(profile)}; {budget}")
    return 0


def run_show(args: argparse.Namespace) -> int:
    """Print one profile with the counts of a budget and what they come to by both measures; return 0."""
    profile = profiles.resolve(args.source)
    budget = own_budget(profile) if args.retain is None else parse_budget(args.retain, "retain")
    total = profile.model.visual_tokens or _SHOWN
    counts = kept_counts(profile, budget, total)
    print(f"{profile.name}: {_model(profile)}")
    if profile.description:
        print(profile.description)
    print(f"digest {profile_digest(profile)}")
    for reducer, count in zip(profile.reducers, counts, strict=True):
        print(f"  {_reducer(profile, reducer, count)}")
    importance, operator = profile.importance, profile.operator
    print(
        f"queries {importance.queries}, window {profile.window}, heads {importance.heads}, reduce {importance.reduce}, "
        f"debias {'none' if importance.debias is None else 'a vector'}, norm {operator.norm}, "
        f"aggregate {operator.aggregate}"
    )
    source = "a published schedule" if str(budget) in profile.schedules else "the rescaling rule"
    print(f"retain {budget} by {profile.budget.measure} ({source}): {measures(profile, counts, total)}")
    if profile.model.visual_tokens is None:
        print(f"counts are of an image of {_SHOWN} visual tokens; those of others follow from their own number")
    if profile.schedules:
        print(f"schedules for {_join(sorted(map(int, profile.schedules)))}")
    return 0


def run_validate(args: argparse.Namespace) -> int:
    """Print one line for each file, errors on stderr; return 0 if all are valid, otherwise 2."""
    code = 0
    for file in args.files:
        try:
            profile = read_profile(file)
            total = profile.model.visual_tokens or _SHOWN
            counts = kept_counts(profile, total=total)
        except EosError as error:
            print(f"eos-vllm: error: {error}", file=sys.stderr)
            code = 2
        else:
            print(f"{file}: valid, {profile.name} keeps {_join(counts)} of {total}, {measures(profile, counts, total)}")
    return code


def run_rescale(args: argparse.Namespace) -> int:
    """Write the profile for another budget and print what it keeps; return 0."""
    profile = rescale(profiles.resolve(args.source), parse_budget(args.retain, "retain"))
    _write(profile, args.out)
    return 0


def run_scale(args: argparse.Namespace) -> int:
    """Write or print the profile for another model; return 0."""
    profile = profiles.resolve(args.source)
    visual = profile.model.visual_tokens if args.visual_tokens is None else args.visual_tokens
    scaled = scale_to_model(profile, args.layers, visual, args.name)
    if args.out is None:
        print(_text(scaled), end="")
    else:
        _write(scaled, args.out)
    return 0


def run_upgrade(args: argparse.Namespace) -> int:
    """Write or print the profile in the newest schema; return 0."""
    upgraded = upgrade(profiles.resolve(args.source), args.window)
    if args.out is None:
        print(_text(upgraded), end="")
    else:
        _write(upgraded, args.out)
    return 0


def run_schema(_args: argparse.Namespace) -> int:
    """Print the JSON schema; return 0."""
    print(json.dumps(json_schema(), indent=2))
    return 0


def json_schema() -> dict[str, Any]:
    """The JSON schema of ``eos-profile/2``; rules that concern several fields are in words, in its description."""
    schema = Profile.model_json_schema(by_alias=True)
    schema["description"] = (
        "Operator profile of eos-vllm. Beyond this schema: a file has at most 1 MiB; reducer layers strictly increase "
        "and are below num_decoder_layers - 1; -1 and select belong to the first reducer, withdraw to the last; "
        "gate*discard is below 1; each schedule has a positive whole number as its key and one count per reducer, "
        "which do not increase and lie in 1..visual_tokens (0 where withdrawn); "
        "budget.minimum is at most visual_tokens; "
        "budget.measure flops needs model.flops_crossover."
    )
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def where(profile: Profile) -> str:
    """Where a profile reduces, in words."""
    parts = [] if profile.selector is None else [f"{profile.selector.rule} before the decoder"]
    if reducing := [r.layer for r in profile.inside if not isinstance(r, Withdrawal)]:
        parts.append(f"after layer{'s' * (len(reducing) > 1)} {_join(reducing)}")
    parts += [f"withdrawn after layer {r.layer}" for r in profile.inside if isinstance(r, Withdrawal)]
    return ", ".join(parts)


def _reducer(profile: Profile, reducer: Any, count: int) -> str:
    if isinstance(reducer, Withdrawal):
        return f"after layer {reducer.layer}: withdraws what is left"
    values = f"gamma {reducer.gamma:g}, tau {reducer.tau:g}, theta {reducer.theta:g}, "
    values += f"rho {reducer.rho:g}, nu {reducer.nu:g}"
    kind = "prune" if profile.params_of(reducer).is_identity else values
    if reducer is not profile.before:
        return f"after layer {reducer.layer}: keeps {count} ({kind})"
    assert profile.selector is not None
    kind = "mixes tokens itself" if profile.selector.mixes else kind
    select = ", ".join(f"{name} {value}" for name, value in profile.selector.model_dump().items())
    return f"before the decoder: keeps {count} ({select}; {kind})"


def _model(profile: Profile) -> str:
    model = profile.model
    images = "images of any size" if model.visual_tokens is None else f"{model.visual_tokens} visual tokens"
    return f"{model.architecture}, {model.num_decoder_layers} layers, {images}"


def _join(values: Any) -> str:
    return ", ".join(map(str, values))


def _text(profile: Profile) -> str:
    return json.dumps(profile.to_dict(), indent=2, ensure_ascii=False) + "\n"


def _write(profile: Profile, out: Path) -> None:
    try:
        out.write_text(_text(profile), encoding="utf-8")
    except OSError as error:
        problem = f"it cannot be written ({error.strerror})"
        raise SettingError("out", str(out), problem, "name a file in a directory that can be written to") from None
    total = profile.model.visual_tokens or _SHOWN
    counts = kept_counts(profile, total=total)
    print(f"wrote {out}: {profile.name} keeps {_join(counts)} of {total}, {measures(profile, counts, total)}")
