"""Kills QAT jobs at any moment, repeats their command, and compares what they end with.

    python tests/train/kill_job.py FOLDER --ranks 2 --kills 30 --seed 1
    python tests/train/kill_job.py FOLDER --device cuda --cfg swin_tiny_patch4_window7_224

A job is the command as it is typed, on made-up images; on a GPU it asks for QAT.DETERMINISTIC.
This process imports everything once and forks the ranks of each run; it stands for torchrun, which
ends all ranks when one has failed. A job is hit at the nth call of something in EVENTS, or after a
time. What came of each hit is a line of JSON, the last line sums up, and the exit code is 1 if
anything was lost, differed or hung.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import load_file

import swinq.commands.report
import swinq.commands.train  # noqa: F401  (all of it is imported before the forks)
from swinq import cli
from swinq.train import parallel, qat, state
from tests.train.ranks import free_port

SAVE_STEPS = 4
FLAGS = (
    *("--train", "--data-path", "fake:64", "--distill"),
    *("--num-calib-batch", "2", "--calib-batchsz", "8", "--batch-size", "4"),
    *("--sensitivity-images", "0", "--opts", "QAT.EPOCHS", "2"),
    *("REPORT.TENSORBOARD", "false", "QAT.SAVE_STEPS", str(SAVE_STEPS), "QAT.EMA", "0.5"),
)
COMMAND = ("--cfg", "demo", "--device", "cpu", *FLAGS)
# What a job can be hit at: a function, under the name by which it is called
EVENTS: tuple[tuple[Any, str], ...] = (
    (qat, "seed_step"),
    (parallel, "clip_gradients"),
    (parallel, "save_tensors"),
    (state, "save_file"),
    (os, "fsync"),
    (os, "replace"),
)
IN_A_STEP = ("seed_step", "clip_gradients")
CODES = {"TERM": 143, "USR1": 138, "INT": 130}
KINDS = ("KILL", *CODES, "full disk", "flipped bit", "cut short")
SMALL_FILE = 100_000  # bytes: more than a page of the report, less than a checkpoint
HANG_S = {"cpu": 120.0, "cuda": 580.0}  # for a run; on a GPU the first one compiles
STRAGGLE_S = 30.0  # for its end once a rank has failed
MOST_HITS = 3  # of one job


@dataclass(frozen=True)
class Hit:
    """What befalls one rank of a run, at its nth event or, if that is 0, after some seconds."""

    kind: str
    rank: int
    event: int
    seconds: float


@dataclass(frozen=True)
class Run:
    """How a run ended.

    Attributes:
        codes: exit codes by rank, negative for a signal. straggled: seconds that the others took
            to end after the first failure.
        met: the event that was hit and the step that was under way; empty if the run ended before.
        events: how many there were by rank, of runs that ended well.
    """

    codes: list[int]
    straggled: float
    met: dict[str, Any]
    said: str
    events: list[int]

    @property
    def ended_well(self) -> bool:
        """Whether everything is done."""
        return not any(self.codes)


class Job:
    """A command that is repeated until it is done, in a folder of its own."""

    def __init__(
        self, folder: Path, ranks: int, workers: int, cfg: str, device: str, opts: list[str]
    ) -> None:
        self.folder, self.ranks, self.device = folder, ranks, device
        accumulation = 2 // ranks  # the same steps on 1 and 2 ranks
        self.argv = [
            *("--cfg", cfg, "--device", device, "--output", str(folder)),
            *("--workers", str(workers), *FLAGS, "TRAIN.ACCUMULATION_STEPS", str(accumulation)),
            *("QAT.DETERMINISTIC", str(device == "cuda"), *opts),
        ]
        folder.mkdir(parents=True)

    def run(self, hit: Hit | None = None) -> Run:
        """Start the ranks, wait as torchrun does, and hit one of them when it is time."""
        port = free_port()
        (self.folder / "met.json").unlink(missing_ok=True)
        pids = []
        for rank in range(self.ranks):
            pid = os.fork()
            if pid == 0:
                self._be_rank(rank, port, hit)
            pids.append(pid)
        codes, straggled = self._wait(pids, hit)
        met = self.folder / "met.json"
        logs = [self.folder / f"rank{rank}.log" for rank in range(self.ranks)]
        counts = [self.folder / f"rank{rank}.events" for rank in range(self.ranks)]
        return Run(
            codes=codes,
            straggled=straggled,
            met=json.loads(met.read_text()) if met.exists() else {},
            said="\n".join(log.read_text() for log in logs),
            events=[int(count.read_text()) if count.exists() else 0 for count in counts],
        )

    def _be_rank(self, rank: int, port: int, hit: Hit | None) -> NoReturn:
        """The forked process: the command, with its output in a file."""
        code = 1
        try:
            if self.ranks > 1:
                os.environ.update(
                    RANK=str(rank),
                    LOCAL_RANK=str(rank),
                    WORLD_SIZE=str(self.ranks),
                    LOCAL_WORLD_SIZE=str(self.ranks),
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(port),
                )
            log = os.open(self.folder / f"rank{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
            events = _Events(self.folder, hit if hit is not None and hit.rank == rank else None)
            leave = cli._leave  # how ranks other than 0 end

            def end(code: int) -> NoReturn:
                (self.folder / f"rank{rank}.events").write_text(str(events.count))
                leave(code)

            cli._leave = end
            end(cli.main(self.argv))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def _wait(self, pids: list[int], hit: Hit | None) -> tuple[list[int], float]:
        codes: dict[int, int] = {}
        began = time.monotonic()
        failed = 0.0
        timed = hit if hit is not None and not hit.event else None
        while len(codes) < len(pids):
            for rank, pid in enumerate(pids):
                if rank not in codes:
                    found, status = os.waitpid(pid, os.WNOHANG)
                    if found:
                        codes[rank] = os.waitstatus_to_exitcode(status)
            now = time.monotonic()
            left = [pid for rank, pid in enumerate(pids) if rank not in codes]
            if timed is not None and now - began > timed.seconds:
                if timed.rank not in codes:
                    _note(self.folder, "time", -1)
                    _strike(pids[timed.rank], timed.kind)
                timed = None
            if not failed and any(codes.values()):
                failed = now
                for pid in left:
                    os.kill(pid, signal.SIGTERM)
            if now - began > HANG_S[self.device] or (failed and now - failed > STRAGGLE_S):
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.002)
        straggled = time.monotonic() - failed if failed else 0.0
        return [codes[rank] for rank in range(self.ranks)], straggled

    def checkpoints(self) -> list[Path]:
        """Training checkpoints, oldest first."""
        return sorted(self.folder.glob("*/*/training/step-*.safetensors"))

    def newest_step(self) -> int:
        """Steps that are safe."""
        files = self.checkpoints()
        return int(files[-1].stem.removeprefix("step-")) if files else 0

    def results(self) -> dict[str, bytes]:
        """The bytes of what the job is for, the best and the exported model, and its last state.

        The best may be the model as it was calibrated: the state tells how training went.
        """
        files = set(self.folder.rglob("*.safetensors")) - set(self.checkpoints())
        found = {path.name: path.read_bytes() for path in files}
        last = load_file(self.checkpoints()[-1])  # without its metadata, which has the time
        return found | {name: tensor.numpy().tobytes() for name, tensor in last.items()}


class _Events:
    """Counts the events of this process and hits it at the one that is meant."""

    def __init__(self, folder: Path, hit: Hit | None) -> None:
        self.folder, self.hit = folder, hit
        self.count, self.step = 0, -1
        for owner, name in EVENTS:
            setattr(owner, name, self._watched(name, getattr(owner, name)))

    def _watched(self, name: str, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "seed_step":
                self.step = args[1]
            self.count += 1
            if self.hit is not None and self.count == self.hit.event:
                _note(self.folder, name, self.step)
                _strike(os.getpid(), self.hit.kind)
            return real(*args, **kwargs)

        return call


def _note(folder: Path, event: str, step: int) -> None:
    (folder / "met.json").write_text(json.dumps({"event": event, "step": step}))


def _strike(pid: int, kind: str) -> None:
    if kind == "full disk":  # writes end early and fail, by the system's own hand
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (SMALL_FILE, hard))
    else:
        os.kill(pid, getattr(signal, f"SIG{kind}" if kind in CODES else "SIGKILL"))


def _damage(path: Path, kind: str, chance: random.Random) -> None:
    """What a bad disk does to a file."""
    if kind == "cut short":
        os.truncate(path, chance.randrange(path.stat().st_size))
    else:
        data = bytearray(path.read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)


def lost(hit: Hit, run: Run, job: Job) -> str:
    """What a hit has cost beyond what it may: all since the last checkpoint, or one step."""
    event, step = run.met["event"], run.met["step"]
    if run.straggled > STRAGGLE_S:
        return "hung"
    if event not in IN_A_STEP:
        return ""
    if hit.kind in CODES:
        if "stopped after step" in run.said:
            # a rank that is slower to leave meets the SIGTERM that follows the first one's end
            if CODES[hit.kind] not in run.codes or {*run.codes} - {CODES[hit.kind], -15}:
                return f"exit codes {run.codes}"
        elif not run.ended_well:
            return f"{hit.kind} in a step gave no stop"
        return "" if job.newest_step() > step else f"step {step + 1}"
    if hit.kind == "full disk":
        return ""
    safe = step // SAVE_STEPS * SAVE_STEPS
    return "" if job.newest_step() >= safe else f"step {safe}"


def hits(chance: random.Random, ranks: int, reference: Run, seconds: float) -> Iterator[Hit]:
    """All kinds in turn, to any rank, at any moment; twice as often at an event as after a time."""
    while True:
        for kind in chance.sample(KINDS, len(KINDS)):
            rank = 0 if kind == "full disk" else chance.randrange(ranks)  # rank 0 writes
            event = chance.randint(1, reference.events[rank]) if chance.random() < 0.67 else 0
            yield Hit(kind, rank, event, chance.uniform(0.0, seconds))


def finish(job: Job, wanted: dict[str, bytes]) -> str:
    """Repeat the command until it is done; what is wrong with the outcome, if anything."""
    run = job.run()
    if not run.ended_well:
        return f"the repeated command ended with {run.codes}: {run.said[-2000:]}"
    found = job.results()
    different = [n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n)]
    leftovers = [str(path) for path in job.folder.rglob("*.partial")]
    leftovers += [str(path) for path in job.folder.rglob(".tmp*")]
    wrong = [f"different: {name}" for name in sorted(different)]
    return "; ".join(wrong + [f"left behind: {name}" for name in leftovers])


def main() -> int:
    """Hit jobs until there were enough hits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cfg", default="demo")
    parser.add_argument("--device", choices=HANG_S, default="cpu")
    parser.add_argument("--opts", nargs="*", default=[])
    args = parser.parse_args()
    torch.set_num_threads(1)  # and no thread before a fork
    chance = random.Random(args.seed)

    def job(name: str, workers: int = 0) -> Job:
        folder = args.folder / f"{args.ranks}-{args.seed}-{name}"
        return Job(folder, args.ranks, workers, args.cfg, args.device, args.opts)

    began = time.monotonic()
    whole = job("reference")
    reference = whole.run()
    seconds = time.monotonic() - began
    if not reference.ended_well:
        print(reference.said, file=sys.stderr)
        return 1
    wanted = whole.results()
    assert sum(name.endswith(".safetensors") for name in wanted) == 3 and len(wanted) > 100
    faults = hits(chance, args.ranks, reference, seconds)
    counts: Counter[str] = Counter()
    problems: list[str] = []
    while counts.total() < args.kills:
        one = job(f"job{counts.total()}", workers=chance.choice((0, 0, 1)))
        for _ in range(chance.randint(1, MOST_HITS)):
            hit = next(faults)
            run = one.run(hit)
            if not run.met:
                break  # the job had ended before
            counts[hit.kind] += 1
            problem = lost(hit, run, one)
            files = one.checkpoints()
            if hit.kind in ("flipped bit", "cut short") and files:
                _damage(files[-1], hit.kind, chance)
                if len(files) == 1:  # nothing is left to go back to: refused until it is gone
                    refused = one.run()
                    if "no training checkpoint can be used" not in refused.said:
                        problem = f"a lone damaged checkpoint gave {refused.codes}"
                    files[-1].unlink(missing_ok=True)
            told = {"hit": hit.kind, "rank": hit.rank, **run.met, "codes": run.codes}
            told |= {"safe": one.newest_step(), "straggled": round(run.straggled, 1)}
            print(json.dumps({**told, "problem": problem}), flush=True)
            problems += [problem] if problem else []
            if run.ended_well:
                break
        problem = finish(one, wanted)
        if problem:
            print(json.dumps({"folder": str(one.folder), "problem": problem}), flush=True)
            problems.append(problem)
        else:
            shutil.rmtree(one.folder)
    summary = {"hits": counts.total(), **counts, "problems": len(problems)}
    print(json.dumps({**summary, "seconds": round(time.monotonic() - began)}), flush=True)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
