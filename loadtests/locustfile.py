"""Locust users that ask a vision-language server questions.

    locust -f loadtests/locustfile.py --host http://127.0.0.1:8000 --model NAME --rows rows.jsonl --retain 64

Without ``--headless`` locust's web page opens, and users go on asking until it stops them. The sweep runs the same file
with ``--workload``, a JSON file of :class:`loadtests.settings.Workload`.
"""

import json
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import gevent
from locust import User, events, task
from locust.exception import StopUser
from locust.stats import CSV_STATS_INTERVAL_SEC

# locust puts the folder of this file on the path, not the project's.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eos_vllm.core.errors import SettingError
from loadtests.events import fire
from loadtests.feed import Feed
from loadtests.lag import LagWatch
from loadtests.settings import Workload, parse_weights


@events.init_command_line_parser.add_listener
def add_arguments(parser: Any, **_: Any) -> None:
    """Our own flags; with a workload file all but --records are taken from it."""
    group = parser.add_argument_group("eos-vllm")
    group.add_argument("--workload", default="", env_var="LOADTEST_WORKLOAD", help="JSON file with all settings")
    group.add_argument("--records", default="", help="JSONL file that takes a line for each request")
    group.add_argument("--model", default="", help="name under which the server serves its model")
    group.add_argument("--rows", default="", help="JSONL of questions and images")
    group.add_argument("--retain", type=int, default=0, help="retain budget that requests name; 0: none")
    group.add_argument("--scenarios", default="single=1", help="e.g. single=3,several=1,text_only=1")
    group.add_argument("--repeat-share", type=float, default=0.0, help="share of visits that show a known image")
    group.add_argument("--output-tokens", type=int, default=16)
    group.add_argument("--arrival-rate", type=float, default=0.0, help="visits per second, Poisson; 0: closed loop")


def workload_of(options: Any) -> Workload:
    """The run's settings from the command line.

    Raises:
        SettingError: one is missing or out of range.
    """
    if options.workload:
        return Workload.read(Path(options.workload))
    for name in ("model", "rows"):
        if not getattr(options, name):
            raise SettingError(f"--{name}", "", "it is missing", "give it, or --workload")
    return Workload(
        base_url=(options.host or "").rstrip("/"),
        model=options.model,
        rows=options.rows,
        budgets=(options.retain,) if options.retain else (),
        scenarios=parse_weights(options.scenarios),
        repeat_share=options.repeat_share,
        output_tokens=options.output_tokens,
        rate=options.arrival_rate or None,
        label=f"run {time.time():.0f}",
    )


@events.init.add_listener
def set_up(environment: Any, **_: Any) -> None:
    """Plans the run; a mistake in the settings ends locust with one line."""
    try:
        workload = workload_of(environment.parsed_options)
        out = environment.parsed_options.records
        environment.feed = Feed(workload, Path(out) if out else None, lambda record: fire(environment, record))
    except SettingError as e:
        print(f"loadtests: {e}", file=sys.stderr)
        raise SystemExit(2) from None
    environment.lag = LagWatch()
    gevent.spawn(environment.lag.watch)
    if workload.window is not None:
        gevent.spawn(end_with_window, environment)


def end_with_window(environment: Any) -> None:
    """Stops a closed loop's users where they are when the window closes; an open loop's answers are waited for."""
    feed: Feed = environment.feed
    while feed.start is None or not feed.tick():
        gevent.sleep(_LOOK)
    if feed.workload.rate is None:
        environment.runner.quit()


@events.quitting.add_listener
def close(environment: Any, **_: Any) -> None:
    """Puts what only this process knows beside the records."""
    feed: Feed = environment.feed
    feed.close()
    if environment.parsed_options.csv_prefix:
        # locust writes its CSV once a second, and closes it without a last look: a short run would leave it empty.
        gevent.sleep(CSV_STATS_INTERVAL_SEC + 0.1)
    if environment.parsed_options.records:
        facts: dict[str, Any] = {"lag_seconds": environment.lag.summary(), "late_encodings": feed.late_encodings}
        if feed.window is not None:
            facts["window"] = feed.window.to_dict()
        Path(environment.parsed_options.records).with_suffix(".client.json").write_text(json.dumps(facts) + "\n")
    # Failures are counted in the records; they are the sweep's to judge, not a reason to distrust the run.
    environment.process_exit_code = 0


_LOOK = 0.1


class Chat(User):
    """Closed loop: a visit, then the next. Open loop: a single user that sends visits off when they are due."""

    host = "http://127.0.0.1:8000"

    @task
    def work(self) -> None:
        """One visit, or the whole open loop."""
        feed: Feed = self.environment.feed
        if feed.workload.rate is not None:
            self._arrivals(feed, feed.workload.rate)
        elif (visit := feed.next()) is not None:
            feed.run(visit)
        if feed.exhausted:
            # A closed loop with a window is ended by that.
            if feed.over and (feed.window is None or feed.workload.rate is not None):
                gevent.spawn(self.environment.runner.quit)
            raise StopUser()

    @staticmethod
    def _arrivals(feed: Feed, rate: float) -> None:
        draw, due, running = Random(f"{feed.workload.seed}/arrivals"), 0.0, []
        while True:
            gevent.sleep(max(0.0, due - feed.elapsed()))
            if (visit := feed.next()) is None:
                break
            running.append(gevent.spawn(feed.run, visit, due))
            due += draw.expovariate(rate)
        # Where a window has closed, answers that are long in coming are given up.
        gevent.joinall(running, timeout=None if feed.window is None else feed.workload.ramp_most)
        gevent.killall(running)
