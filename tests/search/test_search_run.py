"""Whole searches of few steps: repeatable, resumable, stoppable, and clear about what is wrong."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from search_cases import before_step, kill_at, make_rules, make_settings, make_theta

from eos_search.examples import Broken
from eos_search.loop import DivergedError, StepSampler, Trainer
from eos_search.objective import Objective, TaskTerms
from eos_search.process import deterministic, stop_signals
from eos_search.restarts import read_or_search
from eos_search.run import Interrupted, run_search
from eos_search.run_folder import read_records
from eos_search.settings import read_config, read_settings
from eos_search.space import search_space
from eos_search.spent import seconds_of
from eos_search.structure import Structure
from eos_search.theta import KINDS, Theta, ThetaValues
from eos_vllm.core.budget import kept_counts
from eos_vllm.core.errors import EosError, SettingError
from eos_vllm.core.plan import ImageSpan, Planner
from eos_vllm.core.profile import read_profile
from eos_vllm.models.images import sample_image
from eos_vllm.models.tiny import write_tiny_model


@pytest.fixture(scope="module")
def finished(small_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a search that ran through."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    run_search(make_settings(small_path, output), quiet=True)
    return output


def test_the_result_is_a_profile_that_plans(finished: Path) -> None:
    profile = read_profile(finished / "theta.json")
    last = read_records(finished)[-1]
    assert profile.model.visual_tokens == 36
    counts = kept_counts(profile)
    assert Planner(profile).plan(80, [ImageSpan(4, 36)]).kept == ((36, *counts),)
    assert list(profile.layers) == last["acting"]
    assert kept_counts(profile, 3)[-1] == 3
    provenance = profile.provenance
    assert provenance["seed"] == 42
    assert provenance["data"]["rows"] == 10
    assert provenance["final"]["steps_averaged"] == 6
    assert "--budget 6" in provenance["command"]
    assert "--output runs/searched" in provenance["command"]
    assert str(finished) not in (finished / "theta.json").read_text()


def test_records_tell_each_step(finished: Path) -> None:
    records = read_records(finished)
    assert [record["step"] for record in records] == list(range(6))
    terms = records[3]["terms"]
    assert terms["loss"] == pytest.approx(
        terms["cross_entropy"] + 0.1 * terms["alignment"] + terms["budget"] + terms["cost"]
    )
    assert [record["step"] for record in records if "values" in record] == [0, 2, 4]
    assert list(records[0]["values"]) == list(KINDS)
    assert len(records[0]["values"]["gamma"]) == 6
    assert records[0]["counts"] == [19, 10, 5]
    assert list((finished / "tensorboard").iterdir())
    run = json.loads((finished / "run.json").read_text())
    assert run["search"]["first_step"] == 0


def test_theta_moves(finished: Path) -> None:
    values = read_records(finished)[4]["values"]
    for kind in KINDS:
        assert values[kind][1] != read_records(finished)[0]["values"][kind][1]


def test_the_number_of_threads_is_no_part_of_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    # Engines of other tests in this process have taken torch's own function away (vLLM binds its threads).
    threads = [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    with deterministic():
        assert threads[-1] == 1
    assert threads == [2, 1, 2]


def test_the_same_seed_gives_the_same_profile(small_path: Path, finished: Path, tmp_path: Path) -> None:
    run_search(make_settings(small_path, tmp_path / "again", cache_mib=0, workers=1), quiet=True)
    assert (tmp_path / "again/theta.json").read_bytes() == (finished / "theta.json").read_bytes()
    other = run_search(make_settings(small_path, tmp_path / "other", seed=7), quiet=True)
    assert other.profile.reducers != read_profile(finished / "theta.json").reducers


@pytest.mark.parametrize("step", [1, 3, 5])
def test_killed_and_resumed_it_ends_the_same(small_path: Path, finished: Path, tmp_path: Path, step: int) -> None:
    """Checkpoints come every 2 steps: the kill falls before the first one, or takes a step that is done again."""
    settings = make_settings(small_path, tmp_path / "run")
    kill_at(step, settings)
    assert len(read_records(tmp_path / "run")) == step
    result = run_search(settings, resume=True, quiet=True)
    assert (tmp_path / "run/theta.json").read_bytes() == (finished / "theta.json").read_bytes()
    assert result.records == read_records(finished)
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert run["search"]["first_step"] == step // 2 * 2
    assert run["cpu_seconds"] == seconds_of(tmp_path / "run") > 0


def test_budgets_go_on_where_they_were(small_path: Path, tmp_path: Path) -> None:
    """Three budgets for batches of two: every step begins with another one."""
    changes: dict[str, Any] = {"serve_budgets": (20, 10, 4)}
    whole = run_search(make_settings(small_path, tmp_path / "whole", **changes), quiet=True)
    settings = make_settings(small_path, tmp_path / "run", **changes)
    with before_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM)), pytest.raises(Interrupted):
        run_search(settings, quiet=True)
    assert run_search(settings, resume=True, quiet=True).records == whole.records
    assert (tmp_path / "run/theta.json").read_bytes() == whole.path.read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves(small_path: Path, finished: Path, tmp_path: Path, number: int) -> None:
    settings = make_settings(small_path, tmp_path / "run")
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with before_step(2, lambda: os.kill(os.getpid(), number)), pytest.raises(Interrupted) as interrupted:
        run_search(settings, quiet=True)
    assert interrupted.value.step in (3, 4)  # the signal is seen before or after its own step
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    run_search(settings, resume=True, quiet=True)
    assert (tmp_path / "run/theta.json").read_bytes() == (finished / "theta.json").read_bytes()


def test_resuming_a_finished_search_writes_the_same(small_path: Path, finished: Path) -> None:
    before = (finished / "theta.json").read_bytes()
    run_search(make_settings(small_path, finished), resume=True, quiet=True)
    assert (finished / "theta.json").read_bytes() == before


def test_frozen_kinds_stay(small_path: Path, tmp_path: Path) -> None:
    settings = make_settings(
        small_path, tmp_path / "run", frozen="gate,discard", weight_decay=0.1, log_every=1, start="uniform"
    )
    records = run_search(settings, quiet=True).records
    first, last = records[0]["values"], records[-1]["values"]
    assert (first["gate"], first["discard"]) == (last["gate"], last["discard"])
    assert first["gamma"][1] != last["gamma"][1]


def test_weights_of_the_terms_are_settings(small_path: Path, tmp_path: Path) -> None:
    settings = make_settings(small_path, tmp_path / "a", cross_entropy="false", lambda_align=0.5, align_on="visual")
    terms = run_search(settings, quiet=True).records[0]["terms"]
    assert terms["loss"] == pytest.approx(0.5 * terms["alignment"])
    settings = make_settings(small_path, tmp_path / "b", lambda_align=0, budget_measure="layer_average", budget=20)
    record = run_search(settings, quiet=True).records[0]
    assert record["terms"]["alignment"] == 0
    assert record["terms"]["n_final"] == pytest.approx(20)
    assert (72 + record["counts"][0] + 2 * record["counts"][1] + record["counts"][2]) / 6 == pytest.approx(20, abs=1)


BAD = [
    ({"budget": 37}, "budget=37: an image has 36 visual tokens"),
    ({"budget": 0}, "budget=0: .*greater than or equal to 1"),
    ({"max_reducers": 0}, "max_reducers=0: .*greater than or equal to 1"),
    ({"max_reducers": 6}, "max_reducers=6: a model of 6 layers has 5 places"),
    ({"minimum": 7}, "minimum=7: the budget of 6 is less"),
    ({"align_layers": (2, 6)}, r"align_layers=\[2, 6\]: the model has layers 0 to 5"),
    ({"align_layers": "a"}, "align_layers="),
    ({"placement": (1, 5)}, r"placement=\[1, 5\]: these are no places"),
    ({"cross_entropy": False, "lambda_align": 0}, "cross_entropy=False: without the alignment nothing is left"),
    ({"frozen": "gates"}, "frozen='gates'|frozen="),
    ({"learning_rat": 1}, "learning_rat=1: Extra inputs"),
    ({"steps": "many"}, "steps='many'"),
    ({"model": "nowhere"}, "model='nowhere'"),
    ({"prompt": "USER: {question}"}, "prompt=.*<image>"),
    ({"data": "none.jsonl", "data_format": "jsonl"}, "data='none.jsonl': it cannot be read"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_wrong_settings_are_refused_in_one_line(
    small_path: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(EosError, match=message) as error:
        run_search(make_settings(small_path, tmp_path / "run", **changes), quiet=True)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_no_llava_is_refused(small_path: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(EosError, match="model_type='llama'"):
        run_search(make_settings(model, tmp_path / "run"), quiet=True)
    (model / "config.json").write_bytes((small_path / "config.json").read_bytes())
    with pytest.raises(SettingError, match="cannot be loaded"):
        run_search(make_settings(model, tmp_path / "run"), quiet=True)


def test_another_family_is_refused() -> None:
    from eos_search.frozen import check_family

    model: Any = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.language_model = torch.nn.Module()
    model.model.language_model.layers = torch.nn.ModuleList([torch.nn.Linear(1, 1)])
    with pytest.raises(SettingError, match=r"decoder \(Linear\) is not of the Llama family"):
        check_family("some", model)
    with pytest.raises(SettingError, match="not of the Llama family"):
        check_family("some", torch.nn.Linear(1, 1))


def test_an_unwritable_output_is_refused(small_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match=r"output=.*cannot be written to"):
        run_search(make_settings(small_path, tmp_path / "file/run"), quiet=True)


def test_a_used_folder_needs_resume(small_path: Path, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="holds a search already"):
        run_search(make_settings(small_path, finished), quiet=True)
    with pytest.raises(SettingError, match="no search to go on with"):
        run_search(make_settings(small_path, tmp_path / "new"), resume=True, quiet=True)


def test_resuming_with_another_config_is_refused(small_path: Path, finished: Path) -> None:
    with pytest.raises(SettingError, match=r"budget=5: the search in .* has budget=6 \(and 1 more differ\)"):
        run_search(make_settings(small_path, finished, budget=5, steps=9), resume=True, quiet=True)
    same = make_settings(small_path, finished, log_every=1, cache_mib=0)
    assert same.differences(make_settings(small_path, finished)) == []


def test_resuming_with_other_data_is_refused(small_path: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    data = json.loads((tmp_path / "run/data.json").read_text())
    (tmp_path / "run/data.json").write_text(json.dumps(data | {"sha256": "0"}))
    with pytest.raises(SettingError, match=r"data='10 rows: .*not those that the search began with"):
        run_search(make_settings(small_path, tmp_path / "run"), resume=True, quiet=True)


@pytest.mark.parametrize("file", ["theta.json", "restarts.json"])
def test_a_folder_with_a_result_is_no_new_one(file: str, small_path: Path, tmp_path: Path) -> None:
    (tmp_path / file).write_text("{}")
    with pytest.raises(SettingError, match="holds a search already"):
        run_search(make_settings(small_path, tmp_path), quiet=True)
    assert [each.name for each in tmp_path.iterdir()] == [file]


def test_resuming_with_other_weights_is_refused(small_path: Path, finished: Path, tmp_path: Path) -> None:
    """Also where the search has ended, and would only be read."""
    shutil.copytree(finished, tmp_path / "run")
    settings = make_settings(small_path, tmp_path / "run")
    assert read_or_search(settings, resume=True, quiet=True).path == tmp_path / "run/theta.json"
    data = json.loads((tmp_path / "run/data.json").read_text())
    (tmp_path / "run/data.json").write_text(json.dumps(data | {"weights": "0"}))
    for search in (run_search, read_or_search):
        with pytest.raises(SettingError, match=r"model=.*its weights are not those that the search began with"):
            search(settings, resume=True, quiet=True)


def test_resuming_on_another_device_is_refused(small_path: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    run = json.loads((tmp_path / "run/run.json").read_text())
    (tmp_path / "run/run.json").write_text(json.dumps(run | {"device": "cuda:0"}))
    with pytest.raises(SettingError, match=r"device='cpu': the search in .* ran on cuda:0"):
        run_search(make_settings(small_path, tmp_path / "run", device="cpu"), resume=True, quiet=True)


def test_a_stop_by_two_kinds_of_signal_is_one_stop() -> None:
    """Ctrl-C reaches a whole terminal, and whoever started this process then ends it by SIGTERM."""
    with stop_signals() as asked:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert asked == [signal.SIGINT, signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_spoilt_checkpoint_is_told(small_path: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    for file in (tmp_path / "run/checkpoints").glob("*/optimizer.bin"):
        file.write_bytes(b"")
    with pytest.raises(SettingError, match="the checkpoint cannot be read"):
        run_search(make_settings(small_path, tmp_path / "run"), resume=True, quiet=True)


def test_no_number_stops_with_the_rows_named(small_path: Path, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", num_decoder_layers=6, image_size=24)
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    weights["language_model.lm_head.weight"][5] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DivergedError, match=r"loss=nan: no finite number, at train-\d+-\d+, train-\d+-\d+"):
        run_search(make_settings(model, tmp_path / "run"), quiet=True)


class Toy:
    """An example of a made-up task."""

    def __init__(self, name: str) -> None:
        self.id = name


def make_trainer(theta: Theta, folder: Path, **changes: Any) -> Trainer:
    settings = make_settings(folder, folder, **changes)
    return Trainer(theta, make_rules(), Objective(36, 6, 36, ()), settings, Accelerator())


def pulls(example: Any, values: ThetaValues, structure: Structure) -> TaskTerms:
    """A task whose gradient to gamma at layer 1 is 1, or no number for rows of that name."""
    loss = values.column("gamma")[1] * (torch.nan if example.id == "bad" else 1.0)
    return TaskTerms(loss.detach(), loss.detach(), loss)


def test_budgets_take_turns_in_a_batch(tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []

    def task(example: Any, values: ThetaValues, structure: Structure) -> TaskTerms:
        seen.append((example.id, structure.counts[-1]))
        return pulls(example, values, structure)

    trainer = make_trainer(make_theta({1: 0.5, 3: 0.5}), tmp_path, serve_budgets=(20, 4))
    batch = [Toy("a"), Toy("b"), Broken(2, "c", "torn"), Toy("d"), Toy("e")]
    assert trainer.step(batch, task).structure.counts == (19, 10)
    assert seen == [("a", 20), ("b", 4), ("d", 4), ("e", 20)]
    seen.clear()
    trainer = make_trainer(make_theta({1: 0.5, 3: 0.5}), tmp_path, serve_budgets=(20, 4), batch_size=1)
    for name in "abc":
        trainer.step([Toy(name)], task)
    assert [name for name, count in seen if count >= 18] == ["a", "c"]
    with pytest.raises(SettingError, match=r"serve_budgets=.*at least 1"):
        make_settings(tmp_path, tmp_path, serve_budgets=(20, 0))


def test_a_gradient_that_is_no_number_stops(tmp_path: Path) -> None:
    theta = make_theta({1: 0.5})
    before = theta.raw.detach().clone()
    trainer = make_trainer(theta, tmp_path)
    with pytest.raises(DivergedError, match="loss=nan: no finite number, at bad;"):
        trainer.step([Toy("good"), Toy("bad")], pulls)

    def steep(example: Any, values: ThetaValues, structure: Structure) -> TaskTerms:
        loss = (values.column("gamma")[1] - values.column("gamma")[1].detach()).sqrt()
        return TaskTerms(loss.detach(), loss.detach(), loss)

    with pytest.raises(DivergedError, match=r"gradient=(nan|inf): no finite number, at good"):
        trainer.step([Toy("good")], steep)
    assert torch.equal(theta.raw, before)


def test_broken_rows_are_left_out_of_the_mean(tmp_path: Path) -> None:
    theta = make_theta({1: 0.5})
    trainer = make_trainer(theta, tmp_path)
    result = trainer.step([Toy("a"), Broken(1, "b", "OSError: cut"), Toy("c")], pulls)
    assert result.skipped == [("b", "OSError: cut")]
    gamma = theta().column("gamma")[1].item()
    assert result.terms["loss"] == pytest.approx(gamma)
    assert result.terms["gradient"] == pytest.approx(gamma * (1 - gamma), rel=1e-3)
    with pytest.raises(SettingError, match="no image of this batch"):
        trainer.step([Broken(1, "b", "cut")], pulls)


def test_gradients_are_clipped(tmp_path: Path) -> None:
    theta = make_theta({1: 0.5})
    trainer = make_trainer(theta, tmp_path, clip=0.01)
    result = trainer.step([Toy("a")], pulls)
    assert result.terms["gradient"] > 0.1
    assert theta.raw.grad is not None
    assert theta.raw.grad.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_steps_take_each_example_once_per_pass() -> None:
    whole = list(StepSampler(7, 4, 0, 14, seed=3))
    flat = [index for batch in whole for index in batch]
    for epoch in range(8):
        assert sorted(flat[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert flat[:7] != flat[7:14]
    assert list(StepSampler(7, 4, 5, 14, seed=3)) == whole[5:]
    assert len(StepSampler(7, 4, 5, 14, seed=3)) == 9
    halves = [list(StepSampler(7, 4, 0, 14, 3, process, 2)) for process in (0, 1)]
    for batch, left, right in zip(whole, *halves, strict=True):
        assert (batch[::2], batch[1::2]) == (left, right)
    assert list(StepSampler(7, 4, 0, 14, seed=4)) != whole


@pytest.mark.parametrize(
    "name", ["embedded", "embedded-cost", "clutter2-planted", "llava-1.5-7b", "llava-1.5-7b-paper"]
)
def test_committed_configs_are_valid(name: str) -> None:
    settings = read_settings(read_config(name))
    assert settings.output == Path("runs") / name
    from eos_vllm.core.profile import ModelSpec

    depth = {"embedded": 8, "embedded-cost": 8, "clutter2-planted": 12}.get(name, 32)
    spec = ModelSpec(architecture="LlavaForConditionalGeneration", num_decoder_layers=depth, visual_tokens=576)
    objective, _, theta = search_space(settings, spec)
    assert objective.budget == settings.budget
    if depth == 32:
        assert objective.align_layers == (4, 8, 12, 16, 20, 24, 28)
        assert [layer for layer, gate in enumerate(theta().gate.tolist()) if gate > 0.5] == [2, 6, 15]


class TwoAlike:
    """Stands for accelerate on two processes that hold the same examples: sums are twice what one has."""

    device = torch.device("cpu")
    process_index, num_processes = 0, 2

    def prepare(self, optimizer: Any) -> Any:
        return optimizer

    def register_for_checkpointing(self, *parts: Any) -> None:
        assert len(parts) == 2

    def reduce(self, tensor: torch.Tensor, how: str) -> torch.Tensor:
        assert how == "sum"
        return 2 * tensor


def test_processes_share_one_mean(tmp_path: Path) -> None:
    alone, shared = make_theta({1: 0.5}), make_theta({1: 0.5})
    settings = make_settings(tmp_path, tmp_path, warmup=0.0)
    objective = Objective(5, 1, 36, ())  # both penalties pull too, and only once
    batch = [Toy("a"), Toy("b")]
    one = Trainer(alone, make_rules(), objective, settings, Accelerator()).step(batch, pulls)
    accelerator: Any = TwoAlike()
    two = Trainer(shared, make_rules(), objective, settings, accelerator).step(batch, pulls, stop=True)
    assert one.terms == pytest.approx(two.terms)
    assert one.terms["budget"] > 0
    assert one.terms["cost"] > 0
    assert torch.equal(alone.raw, shared.raw)
    assert not torch.equal(alone.raw, make_theta({1: 0.5}).raw)
    assert (one.stop, two.stop) == (False, True)


def test_a_broken_image_is_told_and_left_out(
    small_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = []
    for number in range(4):
        sample_image(number, 96).save(tmp_path / f"{number}.png")
        rows.append({"id": f"row{number}", "image": f"{number}.png", "question": "Is it red?", "answer": "yes"})
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:2000])
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = make_settings(small_path, tmp_path / "run", data=str(file), data_format="jsonl", steps=2)
    assert run_search(settings).path.is_file()
    err = capsys.readouterr().err
    assert "row row1 skipped: OSError" in err
    assert "1 times a row was skipped because its image could not be decoded" in err
