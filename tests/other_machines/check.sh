#!/usr/bin/env bash
# Whether the package installs, trains, packs, generates and agrees with its definition on this machine:
#
#     PYTHON=python3.12 tests/other_machines/check.sh [FOLDER]
#
# Builds the wheel and installs it into an environment of its own, where nothing of the clone is found
# but copies of the tests. FOLDER keeps all that, for a second run to begin with the tests at once.
# For an emulated processor, which takes long to compile all kernels of a step in both precisions:
# BACKEND=numpy trains by the definition, and SELECT names the tests as pytest's -k does.
set -euo pipefail

clone=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [ $# -gt 0 ]; then
    mkdir -p "$1"
    folder=$(cd "$1" && pwd)
else
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
fi
unset PYTHONPATH PYTHONDONTWRITEBYTECODE

said() {
    printf '%s  %s\n' "$(date +%T)" "$*"
}

if ! [ -e "$folder/installed" ]; then
    said "wheel and environment"
    mkdir -p "$folder/source"
    # A copy: the build leaves files behind.
    tar -C "$clone" --exclude=__pycache__ -cf - pyproject.toml README.md LICENSE cli mhmoe_np \
        | tar -C "$folder/source" -xf -
    "${PYTHON:-python3}" -m venv "$folder/environment"
    "$folder/environment/bin/pip" wheel --quiet --no-deps --wheel-dir "$folder" "$folder/source"
    "$folder/environment/bin/pip" install --quiet --no-compile "$folder"/mhmoe_np-*.whl \
        hypothesis pytest pytest-timeout pytest-xdist
    touch "$folder/installed"
fi
export PATH=$folder/environment/bin:$PATH
cd "$folder"
python - <<'END'
import platform, sys
from importlib.metadata import version

import mhmoe_np

assert mhmoe_np.__file__.startswith(sys.prefix), mhmoe_np.__file__
names = "numpy", "numba", "llvmlite", "scipy", "tokenizers", "safetensors"
print(platform.python_implementation(), platform.python_version(), platform.machine(), platform.platform())
print(*(f"{name} {version(name)}" for name in names), sep=", ")
END

if ! [ -e packed ]; then
    said "train, pack, generate"
    rm -rf run
    cp "$clone/README.md" text.txt
    mhmoe-np train --preset quick-bitnet --data text.txt --steps 2 --out run \
        --backend "${BACKEND:-numba}" \
        --set vocab_size=512 --set batch_size=2 --set sequence_length=64
    mhmoe-np pack run --out packed
fi
for model in run packed; do
    mhmoe-np generate $model --prompt "Call me" --max-new-tokens 8 | tee "$model.txt"
done
cmp run.txt packed.txt

# Packed models against those they were packed from; the fast kernels against their definition: each
# operation, and each kind of whole model (against vectors that another machine has computed).
said "agreement"
rm -rf tests
tar -C "$clone" --exclude=__pycache__ -cf - pyproject.toml tests | tar -xf -
agreement=(
    tests/checkpoints/test_packed_model.py
    tests/operations
    tests/conformance/test_vectors.py
)
python -m pytest -v -n0 --timeout 0 --durations 5 --ignore tests/operations/test_torch.py "${agreement[@]}" -k "${SELECT:-\
not cuda and not tensor_cores and (agree or to_the_bits_of_the_definition or backends_pass or packed_traces)}"
said "all pass"
