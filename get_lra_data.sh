#!/usr/bin/env bash
# Puts the data sets where run_train.py looks for them; `get_lra_data.sh --help` explains how.
# data/layout.py decides when a data set is complete. Kept to bash 3.2 and BSD tools.
set -euo pipefail

: "${CIFAR10_URL:=https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz}"
: "${IMDB_URL:=https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz}"
: "${LRA_URL:=https://storage.googleapis.com/long-range-arena/lra_release.gz}"
# Published by the author beside the download, https://www.cs.toronto.edu/~kriz/cifar.html.
: "${CIFAR10_CHECKSUM=c58f30108f718f92721af3b95e74349a}"
# The publisher gives none; this one is from pytorch/text, torchtext/datasets/imdb.py.
: "${IMDB_CHECKSUM=7c2ac02c03563afcf9b574c7e56c153a}"
: "${LRA_CHECKSUM=}" # none is published
: "${GET_TRIES:=4}"
: "${GET_PAUSE:=3}"

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-$(command -v python || command -v python3 || true)}
dir=datasets
work= # the folder of temporaries, which is also the lock, once it is ours
child=

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
  lra_release    download the LRA release (8 GB), or, if the server refuses it,
                 generate ListOps and Pathfinder32         -> DIR/lra_release

  --check        only report what is there, without network
  --dir DIR      where the data go (default: datasets)

It can be run again at any time: it resumes downloads and leaves complete data sets alone.
An archive put by hand at DIR/{cifar-10-python.tar.gz,aclImdb_v1.tar.gz,lra_release.gz} is used.
Exit status: 0 each NAME is complete, 1 one is not, 2 wrong usage.

Environment, for mirrors and tests:
  {CIFAR10,IMDB,LRA}_URL         where to download from
  {CIFAR10,IMDB,LRA}_CHECKSUM    md5 or sha256 of the archive; empty: it must unzip to its end
  GET_TRIES, GET_PAUSE           tries per download (4) and seconds between them (3)
  PYTHON                         the interpreter that inspects and generates
  EXPECTED_{CIFAR10,IMDB,LISTOPS,PATHFINDER32,AAN}    examples of each part, other than published
END
}

say() { echo "$*"; }
warn() { echo "get_lra_data.sh: $*" >&2; }
stop() { # STATUS MESSAGE
  warn "$2"
  exit "$1"
}

# Bash handles a signal only between foreground commands; behind `wait` it does so at once.
run() {
  "$@" &
  child=$!
  local status=0
  wait "$child" || status=$?
  child=
  return "$status"
}

enter() { # the lock: two runs at once would write into each other's files
  work=$dir/.get_lra_data.tmp
  mkdir -p "$dir" 2>/dev/null || stop 1 "cannot create $dir"
  if ! mkdir "$work" 2>/dev/null; then
    local other
    other=$(cat "$work/pid" 2>/dev/null || true)
    if [ -n "$other" ] && kill -0 "$other" 2>/dev/null; then
      stop 1 "process $other is already at work in $dir; wait until it ends"
    fi
    rm -rf "$work" # of a run that was killed
    mkdir "$work" 2>/dev/null || stop 1 "cannot write to $dir"
  fi
  echo $$ >"$work/pid"
  trap leave EXIT
  trap 'exit 129' HUP
  trap 'exit 130' INT
  trap 'exit 143' TERM
}

leave() {
  if [ -n "$child" ]; then
    kill "$child" 2>/dev/null || true
    wait "$child" 2>/dev/null || true
  fi
  rm -rf "$work"
}

inspect() { # NAME [ROOT]: sets `state` (absent, incomplete, complete), `source`, `found`
  local answer
  answer=$("$python" "$here/data/layout.py" state "${2:-$dir}" "$1") || exit 1
  read -r state source found <<<"$answer"
}
is_complete() { inspect "$@" && [ "$state" = complete ]; }

is_intact() { # ARCHIVE CHECKSUM
  [ -f "$1" ] || return 1
  if [ -z "$2" ]; then
    run gzip -t "$1" 2>/dev/null
  else
    local status=0
    run "$python" "$here/data/layout.py" archive "$@" || status=$?
    [ $status -lt 2 ] || exit $status
    return $status
  fi
}

fetch() { # URL FILE: one try, which resumes FILE; sets `code`, the HTTP status, if it is known
  local progress
  code=
  if command -v curl >/dev/null; then
    if [ -t 2 ]; then progress=--progress-bar; else progress=--silent; fi
    local status=0
    run curl --fail --location --show-error $progress --connect-timeout 30 --speed-limit 1 \
      --speed-time 60 --continue-at - --output "$2" --write-out '%{http_code}' "$1" \
      >"$work/code" || status=$?
    code=$(cat "$work/code")
    # The server cannot resume it (33), or the file is longer than the archive (416): start over.
    case $status:$code in 33:* | *:416) rm -f "$2" ;; esac
    return $status
  elif command -v wget >/dev/null; then
    if [ -t 2 ]; then progress=--show-progress; else progress=--no-verbose; fi
    run wget --quiet $progress --tries=1 --timeout=60 --continue --output-document="$2" "$1"
  else
    stop 1 "needs curl or wget to download; install one of them"
  fi
}

download() { # NAME URL FILE
  local try
  for ((try = 1; try <= GET_TRIES; try++)); do
    if [ "$try" -gt 1 ]; then
      say "$1: try $try of $GET_TRIES in $GET_PAUSE s"
      run sleep "$GET_PAUSE"
    fi
    fetch "$2" "$3" && return 0
    [ -s "$3" ] || rm -f "$3"
    case $code in 401 | 403 | 404 | 410) return 1 ;; esac # refused, or not there
  done
  return 1
}

archive= # an intact archive: put there by hand, or the finished .part

obtain() { # NAME PREFIX FILE: sets `archive`, from PREFIX_URL with PREFIX_CHECKSUM
  local url=$2_URL checksum=$2_CHECKSUM round
  checksum=${!checksum}
  archive=$dir/$3
  if [ -e "$archive" ]; then
    is_intact "$archive" "$checksum" && return 0
    warn "$1: $archive is damaged (checksum $checksum); remove it and run again"
    return 1
  fi
  archive=$archive.part
  is_intact "$archive" "$checksum" && return 0
  for round in first second; do
    say "$1: downloading ${!url}"
    if ! download "$1" "${!url}" "$archive"; then
      if [ -s "$archive" ]; then
        warn "$1: ${!url} was cut; run again to resume"
      else
        warn "$1: no file from ${!url}; put it at $dir/$3 or name a mirror in $url, and run again"
      fi
      return 1
    fi
    is_intact "$archive" "$checksum" && return 0
    rm -f "$archive"
    say "$1: ${!url} sent a damaged file ($round try)"
  done
  warn "$1: ${!url} sent a damaged file twice; name a mirror in $url, and run again"
  return 1
}

unpack() { # NAME FOLDER: moves the archive's FOLDER to DIR if it is complete
  local to=$dir/$2
  local from=$work/unpacked/$2
  say "$1: unpacking to $to"
  rm -rf "$work/unpacked"
  mkdir "$work/unpacked"
  # --no-same-owner: a root user would get the owners that the archive names.
  if ! run tar -xzf "$archive" -C "$work/unpacked" --no-same-owner; then
    warn "$1: cannot unpack $archive (disk full?); make room, or remove it to fetch it again"
    return 1
  fi
  if [ "$1" = lra_release ]; then
    # A mirror's archive may lack one of the two levels.
    if [ ! -d "$from" ]; then from=${from%/*}; fi
  elif ! is_complete "$1" "$work/unpacked"; then
    warn "$1: $archive is not complete ($found); remove it and run again"
    return 1
  fi
  rmdir "$to" 2>/dev/null || true
  mkdir -p "${to%/*}"
  if [ -e "$to" ] || ! mv "$from" "$to"; then
    warn "$1: cannot write $to; move it away and run again"
    return 1
  fi
  case $archive in *.part) rm -f "$archive" ;; esac
}

get() { # NAME: false, with a message, if it is not complete afterwards
  if [ "$1" = lra_release ]; then
    get_lra_release
    return
  fi
  inspect "$1"
  case $state:$1 in
    complete:*) say "$1: complete ($source), left alone" ;;
    *:aan) explain_aan ;;
    incomplete:*) warn "$1: incomplete ($found); move it away and run again" && return 1 ;;
    *:cifar10) obtain "$1" CIFAR10 cifar-10-python.tar.gz && unpack "$1" cifar-10-batches-py ;;
    *:imdb) obtain "$1" IMDB aclImdb_v1.tar.gz && unpack "$1" aclImdb ;;
    *:pathfinder32-*) generate "$1" pathfinder32 --split "${1#*-}" ;;
    *) generate "$1" "$1" ;;
  esac
}

generate() { # NAME TASK [OPTIONS]
  say "$1: generating"
  shift
  run "$python" "$here/generate_lra.py" "$@" --out "$dir" --seed 0 && return 0
  warn "$1: generate_lra.py failed; its message is above"
  return 1
}

get_lra_release() {
  if is_complete listops && is_complete pathfinder32 && is_complete aan; then
    say "lra_release: complete, left alone"
  elif obtain lra_release LRA lra_release.gz; then
    unpack lra_release lra_release/lra_release
  elif [ ! -e "$archive" ]; then # otherwise the server does send it, so another run may finish it
    cat >&2 <<END
  LRA's own server refuses everybody since its repository was archived in February 2025.
  Ask at the E/LRA fork, https://github.com/lucaslingle/e-lra, or whoever has a copy. Put it at
  $dir/lra_release.gz, or unpacked so that listops-1000, pathfinder32 and tsv_data lie in
  $dir/lra_release or $dir/lra_release/lra_release.
END
    say "lra_release: generating ListOps and Pathfinder32 instead"
    get listops
    get pathfinder32
  fi
}

explain_aan() {
  cat >&2 <<END
get_lra_data.sh: aan: $state ($found), and its texts may not be redistributed.
  Obtain them from the LRA release (folder tsv_data of lra_release.gz), which drew them from the
  ACL Anthology Network, https://clair.eecs.umich.edu/aan/, and put them here:
  $dir/lra_release/tsv_data/new_aan_pairs.{train,eval,test}.tsv
END
}

main() {
  local check=false name
  local wanted=() listed=() # a name after ? is reported, and does not count in the exit status
  while [ $# -gt 0 ]; do
    case $1 in
      cifar10 | imdb | lra_release | listops | aan) wanted+=("$1") ;;
      pathfinder32 | pathfinder32-intermediate | pathfinder32-baseline) wanted+=("$1") ;;
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
  [ -n "$python" ] || stop 1 "needs python; activate the environment or set PYTHON"
  if [ ${#wanted[@]} -eq 0 ]; then
    wanted=(cifar10 imdb listops pathfinder32 aan)
    listed=(cifar10 imdb listops pathfinder32)
    listed+=('?pathfinder32-intermediate' '?pathfinder32-baseline' '?aan')
  else
    for name in "${wanted[@]}"; do
      case $name in lra_release) listed+=(listops pathfinder32 aan) ;; *) listed+=("$name") ;; esac
    done
  fi
  if ! $check; then
    enter
    for name in "${wanted[@]}"; do get "$name" || true; done
  fi
  "$python" "$here/data/layout.py" table "$dir" "${listed[@]}" # its status is ours
}

main "$@"
