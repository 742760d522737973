#!/usr/bin/env bash
# Puts the data sets where run_train.py looks for them; `get_lra_data.sh --help` says how.
# Downloading, unpacking and messages are here; when a data set is complete and usable, and when an
# archive is whole, is asked of data/inspection.py. Kept to what bash 3.2 and BSD tools understand.
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
inspection=("$python" "$here/data/inspection.py")
dir=datasets
work= # the folder of temporaries, once it is ours to remove
child=
problem= # why the last step failed

usage() {
  cat <<'END'
usage: get_lra_data.sh NAME... [--check] [--dir DIR]

  cifar10        download CIFAR-10 (170 MB)                -> DIR/cifar-10-batches-py
  imdb           download the IMDb reviews (84 MB)         -> DIR/aclImdb
  lra_release    download the LRA release (8 GB), or, where the server refuses it,
                 generate ListOps and Pathfinder32         -> DIR/lra_release
  listops        generate it, unless it is there           -> DIR/lra_release/listops-1000
  pathfinder32   generate it, unless it is there           -> DIR/lra_release/pathfinder32
  aan            say where to obtain it                    -> DIR/lra_release/tsv_data
  all            all of them

  --check        only report what is there, without network (no NAME: all)
  --dir DIR      where the data go (default: datasets)

Run it again at any time: it resumes what was cut and leaves alone what is complete.
An archive put by hand at DIR/{cifar-10-python.tar.gz,aclImdb_v1.tar.gz,lra_release.gz} is used.
Exit status: 0 all that was asked for is usable, 1 it is not, 2 wrong usage.

Environment, for mirrors and tests:
  {CIFAR10,IMDB,LRA}_URL         where to download from
  {CIFAR10,IMDB,LRA}_CHECKSUM    md5 or sha256 of the archive; empty: it must unzip to its end
  GET_TRIES, GET_PAUSE           tries per download (4) and seconds between them (3)
  PYTHON                         the interpreter that inspects and generates
  CIFAR10_BATCH_BYTES, IMDB_FILES, LISTOPS_ROWS, PATHFINDER32_IMAGES, AAN_ROWS
                                 least bytes of a batch file, files per folder, rows of
                                 train, val and test, images: what is expected of downloads
END
}

say() { echo "$*"; }
warn() { echo "get_lra_data.sh: $*" >&2; }
stop() { # STATUS MESSAGE
  local status=$1
  shift
  warn "$@"
  exit "$status"
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
  local lock=$dir/.get_lra_data.lock
  mkdir -p "$dir" 2>/dev/null || stop 1 "cannot create $dir"
  if ! ln -s $$ "$lock" 2>/dev/null; then
    if kill -0 "$(readlink "$lock")" 2>/dev/null; then
      stop 1 "process $(readlink "$lock") is already at work in $dir; wait until it ends"
    fi
    rm -f "$lock" # of a run that was killed
    ln -s $$ "$lock" 2>/dev/null || stop 1 "cannot write to $dir"
  fi
  work=$dir/.get_lra_data.tmp
  trap leave EXIT
  trap 'exit 129' HUP
  trap 'exit 130' INT
  trap 'exit 143' TERM
  rm -rf "$work"
  mkdir "$work"
}

leave() {
  if [ -n "$child" ]; then
    kill "$child" 2>/dev/null || true
    wait "$child" 2>/dev/null || true
  fi
  rm -rf "$work" "$dir/.get_lra_data.lock"
}

inspect() { # NAME [ROOT]: sets `state` (absent, incomplete, complete, usable), `source`, `found`
  local answer
  answer=$("${inspection[@]}" state "${2:-$dir}" "$1") || exit 1
  read -r state source found <<<"$answer"
}
is_usable() { inspect "$@" && [ "$state" = usable ]; }
is_present() { inspect "$@" && [ "$state" != absent ]; }

is_whole() { # ARCHIVE CHECKSUM
  local status=0
  run "${inspection[@]}" archive "$@" || status=$?
  [ $status -lt 2 ] || exit $status
  return $status
}

fetch() { # TOOL URL FILE: one try that resumes FILE; sets `outcome` and `code`, the HTTP status
  local status=0 progress
  case $1 in
    curl)
      if [ -t 2 ]; then progress=--progress-bar; else progress=--silent; fi
      run curl --fail --location $progress --connect-timeout 30 --speed-limit 1 --speed-time 60 \
        --continue-at - --output "$3" --write-out '%{http_code}' "$2" >"$work/code" || status=$?
      code=$(cat "$work/code")
      ;;
    wget) # where the server ignores the range, it skips the bytes that are here
      if [ -t 2 ]; then progress=--show-progress; else progress=--no-verbose; fi
      run wget --quiet $progress --tries=1 --timeout=60 --server-response \
        --output-file="$work/log" --continue --output-document="$3" "$2" || status=$?
      code=$(sed -n 's|^ *HTTP/[0-9.]* \([0-9][0-9]*\).*|\1|p' "$work/log" | tail -n 1)
      ;;
  esac
  case $1:$status in
    *:0) outcome="done" ;;
    curl:23 | wget:3) outcome=unwritable ;;
    curl:33) outcome=unresumable ;;
    *) outcome=unfinished ;;
  esac
}

download() { # NAME URL FILE: false with `problem` set
  local try tool
  tool=$(command -v curl || command -v wget) ||
    stop 1 "needs curl or wget to download; install one of them"
  for ((try = 1; try <= GET_TRIES; try++)); do
    if [ "$try" -gt 1 ]; then
      say "$1: $problem; try $try of $GET_TRIES in $GET_PAUSE s"
      run sleep "$GET_PAUSE"
    fi
    fetch "${tool##*/}" "$2" "$3"
    [ -s "$3" ] || rm -f "$3"
    case $outcome:${code:-000} in
      done:*) return 0 ;;
      unwritable:*) problem="cannot write $3 (disk full?)" && return 1 ;;
      unresumable:*) problem="$2 cannot be resumed, starting over" && rm -f "$3" ;;
      *:416) return 0 ;; # an old curl, where nothing is left to send; the checksum will tell
      *:401 | *:403) problem="$2 answered $code (refused)" && return 1 ;;
      *:404 | *:410) problem="$2 answered $code (not there)" && return 1 ;;
      *:000) problem="$2 gave no answer (no network, or a wrong address)" ;;
      *:2??) problem="$2 broke off, $(($(wc -c <"$3"))) bytes are here" ;;
      *) problem="$2 answered $code" ;;
    esac
  done
  return 1
}

archive= # a verified archive: put there by hand, or the finished .part

obtain() { # NAME PREFIX FILE: sets `archive`, from PREFIX_URL with PREFIX_CHECKSUM
  local url=$2_URL checksum=$2_CHECKSUM round
  checksum=${!checksum}
  archive=$dir/$3
  if [ -e "$archive" ]; then
    is_whole "$archive" "$checksum" && return 0
    warn "$1: $archive is damaged (checksum $checksum); remove it and run again"
    return 1
  fi
  archive=$archive.part
  for round in once twice; do
    say "$1: downloading ${!url}"
    if ! download "$1" "${!url}" "$archive"; then
      if [ -s "$archive" ]; then
        warn "$1: $problem; run again to resume"
      else
        warn "$1: $problem; put the file at $dir/$3 or name a mirror in $url, and run again"
      fi
      return 1
    fi
    is_whole "$archive" "$checksum" && return 0
    rm -f "$archive"
    problem="${!url} sent a damaged file (checksum ${checksum:-of gzip}) $round"
    say "$1: $problem"
  done
  warn "$1: $problem; name a mirror in $url, and run again"
  return 1
}

unpack() { # LABEL FOLDER TEST NAME...: moves the archive's FOLDER into place if all pass the TEST
  local label=$1 from=$work/unpacked/$2 to=$dir/$2 test=$3 name
  shift 3
  say "$label: unpacking to $to"
  rm -rf "$work/unpacked"
  mkdir "$work/unpacked"
  # --no-same-owner: a root user would get the owners that the archive names.
  if ! run tar -xzf "$archive" -C "$work/unpacked" --no-same-owner; then
    warn "$label: cannot unpack $archive (disk full?); make room, or remove it to fetch it anew"
    return 1
  fi
  for name in "$@"; do
    if ! $test "$name" "$work/unpacked"; then
      warn "$label: $archive does not hold all of $name ($found); remove it and run again"
      return 1
    fi
  done
  # The archive of a mirror may lack one of the two levels of lra_release.
  if [ ! -d "$from" ]; then from=${from%/*}; fi
  rmdir "$to" 2>/dev/null || mkdir -p "${to%/*}"
  mv "$from" "$to" || return 1
  case $archive in *.part) rm -f "$archive" ;; esac
}

get() { # NAME: false, with a message, if it is not usable afterwards
  if [ "$1" = lra_release ]; then
    get_lra_release
  elif is_usable "$1"; then
    say "$1: complete ($source), left alone"
  elif [ "$1" = aan ]; then
    refuse_aan
  elif [ "$state" != absent ]; then
    warn "$1: what is there is not complete ($found); move it away and run again"
    return 1
  else
    case $1 in
      cifar10) obtain "$1" CIFAR10 cifar-10-python.tar.gz &&
        unpack "$1" cifar-10-batches-py is_usable "$1" ;;
      imdb) obtain "$1" IMDB aclImdb_v1.tar.gz && unpack "$1" aclImdb is_usable "$1" ;;
      *) generate "$1" ;;
    esac
  fi
}

generate() { # NAME
  say "$1: generating"
  run "$python" "$here/generate_lra.py" "$1" --out "$dir" --seed 0 && return 0
  warn "$1: generate_lra.py failed; its message is above"
  return 1
}

get_lra_release() {
  local folder=lra_release/lra_release
  if is_usable listops && is_usable pathfinder32 && is_usable aan; then
    say "lra_release: $dir/lra_release is complete, left alone"
    return 0
  elif [ -e "$dir/$folder" ]; then
    warn "lra_release: $dir/$folder lacks a part; move it away to download the archive anew"
  elif obtain lra_release LRA lra_release.gz; then
    # Presence is enough: gzip and tar vouch for the rest, and the table shows an odd count.
    unpack lra_release $folder is_present listops pathfinder32 aan || return 1
    if [ -e "$dir/lra_release/listops-1000" ] || [ -e "$dir/lra_release/pathfinder32" ]; then
      say "lra_release: what lies in $dir/lra_release itself is read before $dir/$folder"
    fi
    return 0
  elif [ -e "$archive" ]; then
    return 1 # the server does send it, so it is worth another run
  else
    cat >&2 <<END
  LRA's own server refuses everybody since its repository was archived in February 2025.
  Ask at the E/LRA fork, https://github.com/lucaslingle/e-lra, or whoever has a copy; the fork's
  prep_data.sh shows what is in the archive, but downloads it from the same server.
  Put it at $dir/lra_release.gz, or unpacked so that listops-1000, pathfinder32 and
  tsv_data lie in $dir/lra_release or $dir/$folder.
END
  fi
  say "lra_release: generating ListOps and Pathfinder32 instead"
  get listops && get pathfinder32
}

refuse_aan() {
  cat >&2 <<END
get_lra_data.sh: aan: not usable ($found), and its texts may not be redistributed.
  Obtain them from the LRA release (folder tsv_data of lra_release.gz), which drew them from the
  ACL Anthology Network, https://clair.eecs.umich.edu/aan/, and put them here:
  $dir/lra_release/tsv_data/new_aan_pairs.{train,eval,test}.tsv
END
  return 1
}

main() {
  local check=false asked=" " name
  local names=()
  while [ $# -gt 0 ]; do
    case $1 in
      cifar10 | imdb | lra_release | listops | pathfinder32 | aan) asked="$asked$1 " ;;
      all) asked=" cifar10 imdb lra_release aan " ;;
      --check) check=true ;;
      --dir)
        case ${2-} in "" | -*) stop 2 "--dir needs the name of a folder" ;; esac
        dir=$2
        shift
        ;;
      -h | --help)
        usage
        exit 0
        ;;
      *) stop 2 "unknown argument '$1'; --help lists what there is" ;;
    esac
    shift
  done
  if [ "$asked" = " " ]; then
    $check || stop 2 "name what to get: cifar10, imdb, lra_release, ... or all; see --help"
    asked=" cifar10 imdb lra_release aan "
  fi
  [ -n "$python" ] || stop 1 "needs python; activate the environment or set PYTHON"
  if ! $check; then
    enter
    for name in cifar10 imdb lra_release listops pathfinder32 aan; do
      case $asked in *" $name "*) get "$name" || true ;; esac
    done
  fi
  asked=${asked/ lra_release / listops pathfinder32 aan }
  for name in cifar10 imdb listops pathfinder32 aan; do
    case $asked in *" $name "*) names+=("$name") ;; esac
  done
  "${inspection[@]}" table "$dir" "${names[@]}" # its status is ours
}

main "$@"
