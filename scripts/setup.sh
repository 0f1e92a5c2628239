# Sourced by demo.sh and test.sh: makes .venv with the package and the tested versions, and sets $python to its Python.
# Usage: source scripts/setup.sh EXTRA     (a name in pyproject's optional-dependencies)

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${DFLASH_VENV:-$root/.venv}"
python="$venv/bin/python"

pick_python() {
    for name in python3.11 python3.12 python3.13 python3.10 python3; do
        if command -v "$name" >/dev/null && "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "Python 3.10 or newer with its venv module is needed (Debian: apt-get install python3-venv)" >&2
    return 1
}

if [ ! -x "$python" ]; then
    echo "== making $venv"
    "$(pick_python)" -m venv "$venv"
fi
# Reinstalled only when what is asked for has changed.
stamp="$venv/.installed-$1"
wanted="$(cat "$root/pyproject.toml" "$root/scripts/constraints.txt" | sha256sum)"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "== installing (a few minutes the first time)"
    # torch first and by its exact version, so that no other package decides which build is taken.
    "$python" -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' "$root/scripts/constraints.txt")"
    "$python" -m pip install --quiet --disable-pip-version-check -c "$root/scripts/constraints.txt" -e "$root[$1]"
    echo "$wanted" >"$stamp"
fi
