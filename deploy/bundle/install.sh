#!/bin/sh
# Install Resplit from this folder, without a network: sh install.sh [PREFIX], by default /opt/resplit.
#
# Nothing is fetched. Every file is checked first against SHA256SUMS; check SHA256SUMS itself against what whoever gave you
# the archive says of it. Again, and from a later archive, it upgrades what is there; services go on with what they run
# until they are restarted. PYTHON names another interpreter than the one that is found.
set -eu

fail() {
    echo "install.sh: $*" >&2
    exit 1
}

prefix=${1:-/opt/resplit}
here=$(cd "$(dirname "$0")" && pwd)
cd "$here"
. ./BUNDLE

[ "$(uname -s) $(uname -m)" = "Linux $machine" ] || fail "this archive is for Linux on $machine, and here it is $(uname -s) on $(uname -m)"
found=${PYTHON:-python$python}
command -v "$found" > /dev/null || fail "there is no $found; install Python $python, or name it: PYTHON=/usr/bin/python$python"
says=$("$found" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
[ "$says" = "$python" ] || fail "this archive is for Python $python, and $found is $says"
"$found" -c 'import ensurepip, venv' 2> /dev/null || fail "$found cannot make virtual environments; install python$python-venv"

sha256sum --check --quiet --strict SHA256SUMS || fail "files are missing or are not as they were packed; carry the archive anew"
listed=$(wc -l < SHA256SUMS)
there=$(find . -type f ! -name SHA256SUMS | wc -l)
[ "$listed" -eq "$there" ] || fail "$there files are here and $listed were packed; unpack the archive into a folder of its own"

[ -x "$prefix/bin/python" ] || "$found" -m venv "$prefix"
"$prefix/bin/python" -m pip install --quiet --disable-pip-version-check --no-index --find-links wheels \
    --upgrade --force-reinstall --no-deps wheels/*.whl
"$prefix/bin/python" -m pip check --disable-pip-version-check > /dev/null || fail "packages in $prefix do not go together; remove it and install anew"

echo "$("$prefix/bin/python" -c 'from importlib.metadata import version; print("resplit", version("resplit"))') is in $prefix"
echo "next: $prefix/bin/resplit install-service --help"
