"""Whether the tests can fail: plants faults in the CPU operators and says which tests notice.

    python python_tests/mutate.py             # every fault; minutes, most of them for one build
    python python_tests/mutate.py --list
    python python_tests/mutate.py --only stale-seed,wrap-in-round

Not run in CI. A fault is an expression of csrc/ with a wrong one in its place. All are planted in
one copy of the tree (build/mutants, where a second run compiles only what changed), each behind a
switch that the environment sets: ``planted(3) ? (wrong) : (right)``. Without a fault the copy must
pass; with one, some test must fail. Exits with status 1 if a fault was not noticed, and before
anything is built if an expression is not found exactly once.
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# The tests that should notice, by what the fault is in: files, and words of pytest's -k.
WATCH = {
    "attention": (
        ("test_ops.py", "test_properties.py", "test_fuzz.py"),
        "chunked or gradients or gradcheck or alone or dropout or same_bits or properties or fuzz",
    ),
    "hash": (("test_ops.py", "test_properties.py"), "hash or sort or order"),
    "merge": (("test_ops.py", "test_properties.py"), "merge_attention or merge_of"),
    "decoding": (("test_decode.py",), "last_of_each or composite or cached_logits or forgets"),
    "next_values": (("test_ops.py",), "next_values"),
    "rotary": (("test_ops.py",), "rotary"),
}
QUICK = "not opcheck and not cuda and not float64 and not float16 and not compile"
ENOUGH = 3  # failures of one file; the rest of it is left out
FLAGS = '["-O3", "-g0"'  # of setup.py; with -O1 the build takes a fraction of the time
CAUGHT = "caught: "  # how the plugin below reports


@dataclass(frozen=True)
class Fault:
    name: str
    kind: str  # of WATCH
    right: str  # an expression; spaces match any space
    wrong: str
    then: str = ""  # what follows, where the expression alone is not unique


FAULTS = [
    Fault("lse-gradient-sign", "attention", "delta[i] -= grad_lse[i]", "delta[i] += grad_lse[i]"),
    Fault(
        "lse-gradient-lost",
        "attention",
        "optional(grads[1])",
        "std::optional<at::Tensor>()",
        ", saved[4]",
    ),
    Fault("no-wrap-leaks", "attention", "c >= 0 && c / per_round == round", "c >= 0 && c < total"),
    Fault(
        "wrap-in-round",
        "attention",
        "(c % total + total) % total",
        "round * per_round + ((c - round * per_round) % per_round + per_round) % per_round",
    ),
    Fault(
        "window-one-key-short",
        "attention",
        "first + line.window() * line.chunk",
        "first + line.window() * line.chunk - 1",
    ),
    Fault("padding-attends", "attention", "at < 0 || p.is_padding(head, at) ? -1 : at", "at"),
    Fault(
        "causal-off-by-one",
        "attention",
        "keys.causal ? query.position : std::numeric_limits<Integer<T>>::max()",
        "keys.causal ? query.position - 1 : std::numeric_limits<Integer<T>>::max()",
    ),
    Fault(
        "bucket-of-another-round",
        "attention",
        "chunk_round == round ? buckets[position] : std::numeric_limits<int32_t>::min()",
        "buckets[position]",
    ),
    Fault(
        "stale-seed",
        "attention",
        "static_cast<uint64_t>(*args.dropout_seed->template const_data_ptr<int64_t>())",
        "first_of_all(*args.dropout_seed->template const_data_ptr<int64_t>())",
    ),
    Fault("dropout-of-one-head", "attention", "static_cast<uint32_t>(head)", "0U"),
    Fault("dropout-not-in-dP", "attention", "grad *= keep", "grad"),
    Fault(
        "duplicates-at-window-end",
        "attention",
        "(WordVector<T>)distance <= static_cast<Word>(keys.window_span)",
        "(WordVector<T>)distance < static_cast<Word>(keys.window_span)",
    ),
    Fault(
        "duplicates-across-the-line",
        "attention",
        "(distance < 0) & keys.line_period",
        "IntegerVector<T>{}",
    ),
    Fault("peak-of-last-round", "attention", "std::max(old_peak, peak)", "peak"),
    Fault(
        "backward-scale-1%",
        "attention",
        "weight * (grad - delta) * (factor * keys.shrink)",
        "weight * (grad - delta) * (factor * keys.shrink * T(1.01))",
    ),
    Fault("length-of-keys-lost", "attention", "grad[d] -= along * key[d]", "grad[d]"),
    Fault(
        "blocks-of-two-rounds-at-once",
        "attention",
        "inside || !line.wrap ? alternate[odd] : alone",
        "alternate[odd]",
    ),
    Fault(
        "ties-to-the-highest",
        "hash",
        "p > highest ? IntegerVector<T>{} + c : highest_at",
        "p >= highest ? IntegerVector<T>{} + c : highest_at",
    ),
    Fault(
        "unstable-sort",
        "hash",
        "order[starts[buckets[i]]++] = static_cast<int32_t>(i)",
        "order[starts[buckets[length - 1 - i]]++] = static_cast<int32_t>(length - 1 - i)",
    ),
    Fault("merged-lse-without-peak", "merge", "total.log() + peak", "total.log()"),
    Fault("append-off-by-one", "decoding", "held % window", "(held + 1) % window"),
    Fault("decode-counts-twice", "decoding", "!once", "true"),
    Fault("no-previous-value", "next_values", "centre += mix.previous", "centre"),
    Fault(
        "rotary-turned-on",
        "rotary",
        "apply_rotary(grads[0], saved[0], saved[1].neg())",
        "apply_rotary(grads[0], saved[0], saved[1])",
    ),
]

HEADER = """#pragma once
#include <cstdint>
#include <cstdlib>
namespace reformer {
inline const char* const named_fault = std::getenv("REFORMER_FAULT");
inline const int planted_fault = named_fault ? std::atoi(named_fault) : 0;
__attribute__((always_inline)) inline bool planted(int fault) { return fault == planted_fault; }
inline uint64_t first_of_all(int64_t x) {
  static const auto first = static_cast<uint64_t>(x);
  return first;
}
}  // namespace reformer
"""


def planted() -> dict[Path, str]:
    """The sources with every fault behind its switch, by path in the tree."""
    sources = {
        path.relative_to(ROOT): path.read_text()
        for path in sorted((ROOT / "csrc").rglob("*"))
        if path.suffix in (".cpp", ".h") and ROOT / "csrc" / "tests" not in path.parents
    }
    edits = collections.defaultdict(list)
    lost = []
    for number, fault in enumerate(FAULTS, start=1):
        right, then = (r"\s+".join(map(re.escape, x.split())) for x in (fault.right, fault.then))
        pattern = re.compile(f"{right}(?={then})")
        places = [
            (path, match) for path, text in sources.items() for match in pattern.finditer(text)
        ]
        if len(places) != 1:
            lost.append(f"{fault.name}: expected once, found {len(places)} times: {fault.right}")
            continue
        path, match = places[0]
        edits[path].append((match.span(), f"(planted({number}) ? ({fault.wrong}) : ({match[0]}))"))
    setup = (ROOT / "setup.py").read_text()
    if FLAGS not in setup:
        lost.append(f"setup.py: {FLAGS}")
    if lost:
        raise SystemExit("mutate: the sources have changed:\n" + "\n".join(lost))
    for path, found in edits.items():
        text = sources[path]
        for (start, end), instead in sorted(found, reverse=True):
            text = text[:start] + instead + text[end:]
        header = os.path.relpath("csrc/planted.h", path.parent)
        sources[path] = f'#include "{header}"\n{text}'
    sources[Path("csrc/planted.h")] = HEADER
    sources[Path("setup.py")] = setup.replace(FLAGS, FLAGS.replace("-O3", "-O1"))
    return sources


def copy_tree(scratch: Path) -> None:
    """What is new or differs is written, so that only that is compiled."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    names = [Path(name) for name in listed.stdout.split("\0") if name]
    wanted = {name: (ROOT / name).read_bytes() for name in names if (ROOT / name).is_file()}
    wanted |= {name: text.encode() for name, text in planted().items()}
    for name, data in wanted.items():
        target = scratch / name
        if not target.exists() or target.read_bytes() != data:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
    for path in (scratch / "csrc").rglob("*"):  # moved or deleted since the last run
        if path.is_file() and path.relative_to(scratch) not in wanted:
            path.unlink()


def run_tests(scratch: Path, kind: str, number: int) -> list[str]:
    """The names of the tests that fail with that fault, at most ``ENOUGH`` of a file."""
    files, words = WATCH[kind]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "mutate"]
    command += ["-p", "no:cacheprovider", "-k", f"({words}) and {QUICK}"]
    command += [f"python_tests/{name}" for name in files]
    environment = {**os.environ, "REFORMER_FAULT": str(number), "CI": ""}
    environment["PYTHONPATH"] = str(scratch / "python_tests")
    done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True)
    names = [
        line.removeprefix(CAUGHT) for line in done.stdout.splitlines() if line.startswith(CAUGHT)
    ]
    if done.returncode not in (0, 1):  # crashed: as good as failed
        names.append(f"{files[0]}::ended with {done.returncode}: {done.stderr[-300:]}")
    return names


# The plugin of run_tests ------------------------------------------------------------------------


failures: collections.Counter[Path] = collections.Counter()


def pytest_configure() -> None:
    """A failing example is not shrunk."""
    from hypothesis import Phase, settings

    settings.register_profile("mutate", phases=[Phase.explicit, Phase.generate])
    settings.load_profile("mutate")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if failures[item.path] >= ENOUGH:
        pytest.skip("enough")


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> None:
    if call.excinfo is not None and not call.excinfo.errisinstance(pytest.skip.Exception):
        failures[item.path] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for report in terminalreporter.stats.get("failed", []):
        terminalreporter.write(f"\n{CAUGHT}{report.nodeid.removeprefix('python_tests/')}")
    terminalreporter.write("\n")


# The command ------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="the faults, and where they would be")
    parser.add_argument("--only", type=lambda text: text.split(","), help="names of faults")
    parser.add_argument("--scratch", type=Path, default=ROOT / "build" / "mutants")
    args = parser.parse_args()
    unknown = {*(args.only or ())} - {fault.name for fault in FAULTS}
    if unknown:
        raise SystemExit(f"mutate: no fault of the name {', '.join(sorted(unknown))}")
    if args.list:
        planted()
        for fault in FAULTS:
            print(f"{fault.name:32}{fault.right}  ->  {fault.wrong}")
        return
    copy_tree(args.scratch)
    environment = {**os.environ, "MAX_JOBS": "1", "REFORMER_CUDA": "0"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    nice = ["nice"] if shutil.which("nice") else []
    command = [*nice, sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=args.scratch, env=environment, check=True)
    for kind in WATCH:
        failed = run_tests(args.scratch, kind, 0)
        if failed:
            raise SystemExit("mutate: without a fault these fail:\n" + "\n".join(failed))
    print(f"{'fault':32}caught by")
    missed = 0
    for number, fault in enumerate(FAULTS, start=1):
        if args.only and fault.name not in args.only:
            continue
        names = run_tests(args.scratch, fault.kind, number)
        files = dict.fromkeys(name.partition("::")[0] for name in names)
        first = f", first {names[0].partition('::')[2]}" if names else ""
        print(f"{fault.name:32}{', '.join(files) or 'NOTHING'}{first}", flush=True)
        missed += not names
    if missed:
        raise SystemExit(f"mutate: {missed} faults that no test notices")


if __name__ == "__main__":
    main()
