"""Let the disk fill up at every write of a run in turn, and look at what is left.

    python -m tests.full_disk [--every BYTES] [--most BYTES]

Needs a file system of its own for each trial: a small tmpfs, mounted in a name space of this process
(`unshare`, where that is allowed). A run is started with room for so many bytes, from hardly any to
enough; then room is made, the same command is repeated, and the run must end with the bits of one that
never met a full disk.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.resume import command, digests, prepare, straight

STEPS = 12
ENOUGH = 64 << 20


def can_mount() -> bool:
    """Whether this process may have a file system of its own."""
    return subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0


def in_small_disk(folder: Path, room: int, script: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script where `folder/disk` is a file system with `room` bytes."""
    disk = folder / "disk"
    disk.mkdir(exist_ok=True)
    whole = f"mount -t tmpfs -o size={room} tmpfs {disk} && {script}"
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", whole], capture_output=True, text=True, timeout=300
    )


def trial(folder: Path, room: int, options: list[str]) -> tuple[str, dict[str, str]]:
    """What a run said that had so much room, and the digests of its end once there was more."""
    run = " ".join([*command(folder, "disk/run"), *options]).replace(
        "from mhmoe_cli.main import main; main()", "'from mhmoe_cli.main import main; main()'"
    )
    script = (
        f"{run} >{folder}/said 2>&1; echo $? >{folder}/code; ls -A {folder}/disk >{folder}/left; "
        f"ls {folder}/disk/run/checkpoints >{folder}/saved 2>/dev/null; "
        f"wc -l <{folder}/disk/run/metrics.jsonl >{folder}/lines 2>/dev/null; "
        f"mount -o remount,size={ENOUGH} {folder}/disk && {run} >{folder}/again 2>&1; "
        f"echo $? >{folder}/again-code; cp -r {folder}/disk/run {folder}/kept-{room}"
    )
    in_small_disk(folder, room, script)
    said = (folder / "said").read_text()
    code = int((folder / "code").read_text())
    saved = [int(name[5:]) for name in (folder / "saved").read_text().split()]
    check(folder, room, said, code, saved)
    return said, digests(folder / f"kept-{room}")


def check(folder: Path, room: int, said: str, code: int, saved: list[int]) -> None:
    """One line that says what was lost, and nothing half-written beside it."""
    line = said.splitlines()[-1] if said else ""
    where = f"with {room:,} bytes: {said}"
    assert "Traceback" not in said, where
    left = (folder / "left").read_text().split()
    # What is prepared of a text stays: the same command goes on with it.
    assert left in ([], ["run"], [".tmp-run"]), f"{where}: {left}"
    if code == 0:
        return
    assert line.startswith("mhmoe-np: "), where
    assert "No space left on device" in line, where
    assert code == (1 if left == ["run"] else 2), where
    if code == 2:
        return
    lines = int((folder / "lines").read_text() or 0)
    lost = re.search(r"steps? (\d+)(?: to (\d+))? (?:is|are) lost", line)
    if "scores are not" in line:
        assert saved[-1] == STEPS, where
    elif lost is None:
        assert "nothing is lost" in line or "no step is lost" in line, where
        assert not saved or saved[-1] == lines, where
    else:
        assert int(lost[1]) == (saved[-1] if saved else 0) + 1, where


def main() -> None:
    """Step through the room that a run has."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=32 << 10, help="bytes between two trials")
    parser.add_argument("--most", type=int, default=4 << 20, help="bytes of the last trial")
    arguments = parser.parse_args()
    if not can_mount():
        sys.exit("needs the right to mount a file system")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, STEPS)
        expected, _ = straight(folder)
        ends: dict[str, int] = {}
        for room in range(arguments.every, arguments.most, arguments.every):
            said, found = trial(folder, room, [])
            assert found == expected, f"with {room:,} bytes: another result; {said}"
            last = re.sub(r"\d[\d,.]*", "#", said.splitlines()[-1].replace(name, "") if said else "")
            ends[last[:110]] = ends.get(last[:110], 0) + 1
            if "sample" in said:
                break
    for line, count in ends.items():
        print(f"{count:4d}  {line}")
    print(f"{sum(ends.values())} trials; each ended with the bits of an undisturbed run")


if __name__ == "__main__":
    main()
