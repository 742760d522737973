#!/usr/bin/env bash
# Puts the data sets where run_train.py looks for them; `get_lra_data.sh --help` explains how.
# data/layout.py decides when a data set is complete. Kept to bash 3.2 and BSD tools.
set -euo pipefail

: "${CIFAR10_URL:=https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz}"
: "${IMDB_URL:=https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz}"
# Published by the author next to the download, https://www.cs.toronto.edu/~kriz/cifar.html.
: "${CIFAR10_MD5:=c58f30108f718f92721af3b95e74349a}"
# The publisher gives none; this one is from pytorch/text, torchtext/datasets/imdb.py.
: "${IMDB_MD5:=7c2ac02c03563afcf9b574c7e56c153a}"

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-$(command -v python || command -v python3 || true)}
dir=datasets

usage() {
  cat <<'END'
usage: get_lra_data.sh [NAME...] [--check] [--dir DIR]

Without a NAME: download CIFAR-10 and IMDb, generate ListOps and Pathfinder32 (hard split), and
explain where AAN can be obtained.

  cifar10        download CIFAR-10 (170 MB)                -> DIR/cifar-10-batches-py
  imdb           download the IMDb reviews (84 MB)         -> DIR/aclImdb
  listops        generate it                               -> DIR/lra_release/listops-1000
  pathfinder32   generate the hard split; pathfinder32-intermediate and pathfinder32-baseline
                 are the easier ones                       -> DIR/lra_release/pathfinder32
  aan            explain where to obtain it                -> DIR/lra_release/tsv_data

  --check        only report what is there, without network
  --dir DIR      where the data go (default: datasets)

It can be run again at any time: complete data sets are left alone. The archives
DIR/cifar-10-python.tar.gz and DIR/aclImdb_v1.tar.gz are used instead of a download.
Exit status: 0 each NAME is complete, 1 one is not, 2 wrong usage.

Environment: CIFAR10_URL, CIFAR10_MD5, IMDB_URL and IMDB_MD5 name a mirror and its checksum,
PYTHON the interpreter that inspects and generates.
END
}

warn() { echo "get_lra_data.sh: $*" >&2; }
stop() { # STATUS MESSAGE
  warn "$2"
  exit "$1"
}

table() { # NAME...: false unless all are complete but those named ?NAME
  "$python" "$here/data/layout.py" "$dir" "$@"
}

md5() {
  "$python" -c 'import hashlib, sys; print(hashlib.md5(sys.stdin.buffer.read()).hexdigest())' <"$1"
}

obtain() { # NAME URL MD5 ARCHIVE FOLDER: the archive's FOLDER appears in DIR once it is complete
  local archive=$dir/$4 from=$dir/$4 progress=--silent
  if [ ! -e "$archive" ]; then
    echo "$1: downloading $2"
    archive=$work/$4 from=$2
    if [ -t 2 ]; then progress=--progress-bar; fi
    if ! curl --fail --location $progress --show-error --retry 3 --connect-timeout 30 \
      --speed-limit 1 --speed-time 60 --output "$archive" "$2"; then
      warn "$1: no file from $2; put it at $dir/$4 or name a mirror, see --help"
      return 1
    fi
  fi
  if [ "$(md5 "$archive")" != "$3" ]; then
    warn "$1: $from is damaged, its md5 is not $3; fetch it again or name a mirror"
    return 1
  fi
  echo "$1: unpacking to $dir/$5"
  # --no-same-owner: a root user would get the owners that the archive names.
  tar -xzf "$archive" -C "$work" --no-same-owner || return 1
  rmdir "$dir/$5" 2>/dev/null || true
  if [ -e "$dir/$5" ]; then
    warn "$1: $dir/$5 is incomplete; move it away and run again"
    return 1
  fi
  mv "$work/$5" "$dir/$5"
}

generate() { # NAME TASK [OPTIONS]
  echo "$1: generating"
  shift
  "$python" "$here/generate_lra.py" "$@" --out "$dir" --seed 0
}

explain_aan() {
  cat >&2 <<END
get_lra_data.sh: aan: not complete, and its texts may not be redistributed.
  The LRA release holds them (folder tsv_data of lra_release.gz), drawn from the ACL Anthology
  Network, https://clair.eecs.umich.edu/aan/. LRA's server refuses everybody since its repository
  was archived in February 2025; ask at the E/LRA fork, https://github.com/lucaslingle/e-lra.
  Unpack it by \`tar -xzf lra_release.gz -C $dir\`, or put the texts here:
  $dir/lra_release/tsv_data/new_aan_pairs.{train,eval,test}.tsv
END
}

get() { # NAME
  if table "$1" >/dev/null; then
    echo "$1: complete, left alone"
    return
  fi
  case $1 in
    aan) explain_aan ;;
    cifar10)
      obtain "$1" "$CIFAR10_URL" "$CIFAR10_MD5" cifar-10-python.tar.gz cifar-10-batches-py
      ;;
    imdb) obtain "$1" "$IMDB_URL" "$IMDB_MD5" aclImdb_v1.tar.gz aclImdb ;;
    pathfinder32-*) generate "$1" pathfinder32 --split "${1#*-}" ;;
    *) generate "$1" "$1" ;;
  esac
}

check=false
names=()
while [ $# -gt 0 ]; do
  case $1 in
    cifar10 | imdb | listops | aan) names+=("$1") ;;
    pathfinder32 | pathfinder32-intermediate | pathfinder32-baseline) names+=("$1") ;;
    --check) check=true ;;
    --dir)
      case ${2-} in "" | -*) stop 2 "--dir needs the name of a folder" ;; esac
      dir=$2
      shift
      ;;
    -h | --help) usage && exit 0 ;;
    *) stop 2 "unknown argument '$1'; --help lists the names" ;;
  esac
  shift
done
if [ -z "$python" ]; then stop 1 "needs python; activate the environment or set PYTHON"; fi
optional=()
if [ ${#names[@]} -eq 0 ]; then
  names=(cifar10 imdb listops pathfinder32)
  optional=('?pathfinder32-intermediate' '?pathfinder32-baseline' '?aan')
fi
if ! $check; then
  command -v curl >/dev/null || stop 1 "needs curl to download; install it"
  mkdir -p "$dir" && work=$(mktemp -d "$dir/.get_lra_data.XXXXXX") || stop 1 "cannot write to $dir"
  trap 'rm -rf "$work"' EXIT
  for name in "${names[@]}"; do get "$name" || true; done
  if [ ${#optional[@]} -gt 0 ]; then get aan; fi
fi
table "${names[@]}" ${optional[@]+"${optional[@]}"} # its status is ours
