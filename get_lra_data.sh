#!/usr/bin/env bash
# Puts the data sets where run_train.py looks for them; `get_lra_data.sh --help` says how.
# Kept to what the bash 3.2 and the BSD tools of macOS understand.
set -euo pipefail

: "${CIFAR10_URL:=https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz}"
: "${IMDB_URL:=https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz}"
: "${LRA_URL:=https://storage.googleapis.com/long-range-arena/lra_release.gz}"
# Published by the author beside the download, https://www.cs.toronto.edu/~kriz/cifar.html.
: "${CIFAR10_CHECKSUM=c58f30108f718f92721af3b95e74349a}"
# The publisher gives none; this one is from pytorch/text, torchtext/datasets/imdb.py.
: "${IMDB_CHECKSUM=7c2ac02c03563afcf9b574c7e56c153a}"
: "${LRA_CHECKSUM=}" # none is published, so the archive is only tested with gzip -t

# What counts as complete.
: "${CIFAR10_BATCH_BYTES:=30720000}" # the pixels of 10,000 images; a batch file holds a bit more
: "${IMDB_FILES:=12500}"
: "${LISTOPS_ROWS:=96000 2000 2000}"
: "${PATHFINDER32_IMAGES:=200000}"
: "${AAN_ROWS:=147086 18090 17437}"

: "${GET_TRIES:=4}"
: "${GET_PAUSE:=3}"

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
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
  {CIFAR10,IMDB,LRA}_CHECKSUM    md5 or sha256 of the archive; empty: only gzip -t
  GET_TRIES, GET_PAUSE           tries per download (4) and seconds between them (3)
  PYTHON                         the interpreter that runs generate_lra.py
  CIFAR10_BATCH_BYTES, IMDB_FILES, LISTOPS_ROWS, PATHFINDER32_IMAGES, AAN_ROWS
                                 least bytes of a batch file, files per folder, rows of
                                 train, val and test, images: what --check expects of downloads
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
have() { command -v "$1" >/dev/null 2>&1; }

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

# Each inspect_NAME ROOT sets these from the files alone. Complete: their number and size are as
# expected; usable: complete, and they begin as the reader wants them.
present=no complete=no usable=no source=- found=-

begin_report() { # FOLDER: false where there is nothing to inspect
  present=no complete=no usable=no source=- found="nothing at $1"
  [ -n "$(ls -A "$1" 2>/dev/null)" ] || return 1
  present=yes source=downloaded
  if [ -e "$1/GENERATED.json" ]; then source=generated; fi
}

release_folder() { # ROOT NAME: the archive unpacks to lra_release/lra_release; both depths are read
  if [ -e "$1/lra_release/$2" ] || [ ! -e "$1/lra_release/lra_release/$2" ]; then
    echo "$1/lra_release/$2"
  else
    echo "$1/lra_release/lra_release/$2"
  fi
}

size_of() { du -sh "$1" | awk '{print $1}'; }
first_bytes() { head -c "$1" "$2" | od -An -tx1 | tr -d ' \n'; }
count_lines() { LC_ALL=C grep -c '' || true; } # unlike wc -l, counts a last line without its end
json_number() { sed -n "s/.*\"$1\": *\([0-9][0-9]*\).*/\1/p" "$2" | head -n 1; }

inspect_cifar10() {
  local folder=$1/cifar-10-batches-py name whole=0 pickles=0
  begin_report "$folder" || return 0
  for name in data_batch_1 data_batch_2 data_batch_3 data_batch_4 data_batch_5 test_batch; do
    [ -f "$folder/$name" ] || continue
    if [ "$(wc -c <"$folder/$name")" -ge "$CIFAR10_BATCH_BYTES" ]; then whole=$((whole + 1)); fi
    if [ "$(first_bytes 1 "$folder/$name")" = 80 ]; then pickles=$((pickles + 1)); fi
  done
  found="$whole of 6 batch files, $(size_of "$folder")"
  if [ "$whole" = 6 ]; then complete=yes; fi
  if [ "$whole$pickles" = 66 ]; then usable=yes; fi
}

inspect_imdb() {
  local folder=$1/aclImdb part files whole=0 counts="" empty
  begin_report "$folder" || return 0
  for part in train/pos train/neg test/pos test/neg; do
    files=$(find "$folder/$part" -maxdepth 1 -type f -name '*.txt' 2>/dev/null | count_lines)
    counts="$counts + $files"
    if [ "$files" = "$IMDB_FILES" ]; then whole=$((whole + 1)); fi
  done
  empty=$(find "$folder"/t*/[np]* -maxdepth 1 -name '*.txt' -size 0 2>/dev/null | count_lines)
  found="${counts# + } reviews ($empty empty), $(size_of "$folder")"
  if [ "$whole" = 4 ]; then complete=yes; fi
  if [ "$whole$empty" = 40 ]; then usable=yes; fi
}

inspect_listops() {
  local folder split file rows="" headers=0 expected=$LISTOPS_ROWS
  folder=$(release_folder "$1" listops-1000)
  begin_report "$folder" || return 0
  for split in train val test; do
    file=$folder/basic_$split.tsv
    rows="$rows $(tail -n +2 "$file" 2>/dev/null | count_lines)"
    if [ "$(head -n 1 "$file" 2>/dev/null | tr '\t' ' ')" = "Source Target" ]; then
      headers=$((headers + 1))
    fi
  done
  if [ $source = generated ]; then
    expected=
    for split in train val test; do
      expected="$expected $(json_number "$split" "$folder/GENERATED.json")"
    done
  fi
  rows=${rows# } expected=${expected# }
  found="${rows// / + } rows, $(size_of "$folder")"
  if [ "$rows" = "$expected" ]; then complete=yes; fi
  if [ $complete$headers = yes3 ]; then usable=yes; fi
}

inspect_pathfinder32() {
  local folder images empty rows sample
  folder=$(release_folder "$1" pathfinder32/curv_contour_length_14)
  begin_report "$folder" || return 0
  images=$(find "$folder/imgs" -type f -name '*.png' 2>/dev/null | count_lines)
  empty=$(find "$folder/imgs" -type f -name '*.png' -size 0 2>/dev/null | count_lines)
  rows=$(find "$folder/metadata" -type f -name '*.npy' -exec grep -hc '' {} + 2>/dev/null |
    awk '{n += $1} END {print n + 0}') || true
  found="$images images ($empty empty), $rows rows of metadata, $(size_of "$folder")"
  if [ "$images" = "$rows" ] && [ "$images" -gt "$empty" ]; then complete=yes; fi
  if [ $source = downloaded ] && [ "$images" -lt "$PATHFINDER32_IMAGES" ]; then complete=no; fi
  [ $complete = yes ] || return 0
  # A few of the released images are empty; the reader skips them.
  sample=$(find "$folder/imgs" -type f -name '*.png' -size +0 2>/dev/null | head -n 1) || true
  if [ "$(first_bytes 4 "$sample")" = 89504e47 ]; then usable=yes; fi
}

inspect_aan() {
  local folder split file rows="" five_columns=0
  folder=$(release_folder "$1" tsv_data)
  begin_report "$folder" || return 0
  for split in train eval test; do
    file=$folder/new_aan_pairs.$split.tsv
    [ -f "$file" ] || file=/dev/null
    rows="$rows $(count_lines <"$file")"
    if [ "$(head -n 1 "$file" | LC_ALL=C awk -F'\t' '{print NF}')" = 5 ]; then
      five_columns=$((five_columns + 1))
    fi
  done
  rows=${rows# }
  found="${rows// / + } rows, $(size_of "$folder")"
  if [ "$rows" = "$AAN_ROWS" ]; then complete=yes; fi
  if [ $complete$five_columns = yes3 ]; then usable=yes; fi
}

# is_WORD NAME [ROOT]
is_usable() { "inspect_$1" "${2:-$dir}" && [ $usable = yes ]; }
is_present() { "inspect_$1" "${2:-$dir}" && [ $present = yes ]; }

print_row() { printf '%-13s %-8s %-9s %-7s %-11s %s\n' "$@"; }

report() { # NAME...: a row each; false unless all are usable
  local name all_usable=true
  print_row "data set" present complete usable source found
  for name in "$@"; do
    is_usable "$name" || all_usable=false
    print_row "$name" $present $complete $usable $source "$found"
  done
  $all_usable
}

digest() { # md5|sha256 FILE
  case $1 in
    md5) if have md5sum; then md5sum <"$2"; else md5 -q "$2"; fi ;;
    sha256) if have sha256sum; then sha256sum <"$2"; else shasum -a 256 <"$2"; fi ;;
  esac | cut -d ' ' -f 1
}

is_whole() { # FILE CHECKSUM
  case ${#2} in
    0) run gzip -t "$1" 2>/dev/null ;;
    32) [ "$(digest md5 "$1")" = "$2" ] ;;
    64) [ "$(digest sha256 "$1")" = "$2" ] ;;
    *) stop 2 "checksum $2 is neither an md5 (32 digits) nor a sha256 (64 digits)" ;;
  esac
}

# fetch_with_TOOL URL FILE: one try that resumes FILE, sets `code` to the HTTP status (000: none),
# and returns 0 done, 1 not done, 2 cannot write, 3 cannot resume.
code=000

fetch_with_curl() {
  local status=0 progress=--silent
  if [ -t 2 ]; then progress=--progress-bar; fi
  run curl --fail --location $progress --connect-timeout 30 --speed-limit 1 --speed-time 60 \
    --continue-at - --output "$2" --write-out '%{http_code}' "$1" >"$work/code" || status=$?
  code=$(cat "$work/code")
  case $status in
    0) return 0 ;;
    23) return 2 ;;
    33) return 3 ;;
    *) return 1 ;;
  esac
}

fetch_with_wget() {
  local status=0 progress=--no-verbose
  if [ -t 2 ]; then progress=--show-progress; fi
  # Where the server ignores the range, wget itself skips the bytes that are here.
  run wget --quiet $progress --tries=1 --timeout=60 --server-response --output-file="$work/log" \
    --continue --output-document="$2" "$1" || status=$?
  code=$(sed -n 's|^ *HTTP/[0-9.]* \([0-9][0-9]*\).*|\1|p' "$work/log" | tail -n 1)
  code=${code:-000}
  case $status in
    0) return 0 ;;
    3) return 2 ;;
    *) return 1 ;;
  esac
}

download() { # NAME URL FILE: false with `problem` set
  local try status tool=wget
  if have curl; then tool=curl; fi
  have $tool || stop 1 "needs curl or wget to download; install one of them"
  for ((try = 1; try <= GET_TRIES; try++)); do
    if [ "$try" -gt 1 ]; then
      say "$1: $problem; try $try of $GET_TRIES in $GET_PAUSE s"
      run sleep "$GET_PAUSE"
    fi
    status=0
    fetch_with_$tool "$2" "$3" || status=$?
    [ $status != 0 ] || return 0
    [ -s "$3" ] || rm -f "$3"
    case $status$code in
      2*) problem="cannot write $3 (disk full?)" && return 1 ;;
      3*) problem="$2 cannot be resumed, starting over" && rm -f "$3" ;;
      1416) return 0 ;; # an old curl, where nothing is left to send; the checksum will tell
      1401 | 1403) problem="$2 answered $code (refused)" && return 1 ;;
      1404 | 1410) problem="$2 answered $code (not there)" && return 1 ;;
      1000) problem="$2 gave no answer (no network, or a wrong address)" ;;
      12*) problem="$2 broke off, $(($(wc -c <"$3"))) bytes are here" ;;
      *) problem="$2 answered $code" ;;
    esac
  done
  return 1
}

archive= # a verified archive: put there by hand, or the finished .part

obtain() { # NAME URL-VARIABLE CHECKSUM FILE: sets `archive`
  local name=$1 url=${!2} round
  archive=$dir/$4
  if [ -e "$archive" ]; then
    is_whole "$archive" "$3" && return 0
    warn "$name: $archive is damaged (checksum $3); remove it and run again"
    return 1
  fi
  archive=$dir/$4.part
  for round in 1 2; do
    say "$name: downloading $url"
    if ! download "$name" "$url" "$archive"; then
      if [ -s "$archive" ]; then
        warn "$name: $problem; run again to resume"
      else
        warn "$name: $problem; put the file at $dir/$4 or name a mirror in $2, and run again"
      fi
      return 1
    fi
    is_whole "$archive" "$3" && return 0
    rm -f "$archive"
    problem="$url sent a damaged file (checksum ${3:-of gzip})"
    if [ $round = 1 ]; then say "$name: $problem, once more"; fi
  done
  warn "$name: $problem, twice; name a mirror in $2, and run again"
  return 1
}

unpack() { # LABEL SOURCE TARGET TEST NAME...: moves the SOURCE to TARGET if all NAMEs pass the TEST
  local label=$1 from=$work/unpacked/$2 to=$dir/$3 test=$4 name
  shift 4
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
  mkdir -p "${to%/*}" && mv "$from" "$to" || return 1
  case $archive in *.part) rm -f "$archive" ;; esac
}

get_archive() { # NAME URL-VARIABLE CHECKSUM FILE FOLDER
  if is_usable "$1"; then
    say "$1: $dir/$5 is complete, left alone"
    return 0
  fi
  if [ -e "$dir/$5" ]; then
    warn "$1: $dir/$5 is not complete ($found); move it away and run again"
    return 1
  fi
  obtain "$1" "$2" "$3" "$4" && unpack "$1" "$5" "$5" is_usable "$1"
}

get_cifar10() {
  get_archive cifar10 CIFAR10_URL "$CIFAR10_CHECKSUM" cifar-10-python.tar.gz cifar-10-batches-py
}

get_imdb() { get_archive imdb IMDB_URL "$IMDB_CHECKSUM" aclImdb_v1.tar.gz aclImdb; }

get_lra_release() {
  local target=lra_release/lra_release
  if is_usable listops && is_usable pathfinder32 && is_usable aan; then
    say "lra_release: $dir/lra_release is complete, left alone"
    return 0
  fi
  if [ -e "$dir/$target" ]; then
    warn "lra_release: $dir/$target lacks a part; move it away to download the archive anew"
  elif obtain lra_release LRA_URL "$LRA_CHECKSUM" lra_release.gz; then
    # Presence is enough: gzip and tar vouch for the rest, and the table shows an odd count.
    unpack lra_release $target $target is_present listops pathfinder32 aan || return 1
    if [ -e "$dir/lra_release/listops-1000" ] || [ -e "$dir/lra_release/pathfinder32" ]; then
      say "lra_release: what lies in $dir/lra_release itself is read before $dir/$target"
    fi
    return 0
  elif [ -e "$archive" ]; then
    return 1 # the server does send it, so it is worth another run
  else
    where_to_obtain_lra
  fi
  say "lra_release: generating ListOps and Pathfinder32 instead"
  get_listops && get_pathfinder32
}

where_to_obtain_lra() {
  cat >&2 <<END
  LRA's own server refuses everybody since its repository was archived in February 2025.
  Ask at the E/LRA fork, https://github.com/lucaslingle/e-lra, or whoever has a copy; the fork's
  prep_data.sh shows what is in the archive, but downloads it from the same server.
  Put it at $dir/lra_release.gz, or unpacked so that listops-1000, pathfinder32 and
  tsv_data lie in $dir/lra_release or $dir/lra_release/lra_release.
END
}

generate() { # NAME
  local python=${PYTHON:-$(command -v python || command -v python3 || true)}
  if is_usable "$1"; then
    say "$1: complete ($source), left alone"
    return 0
  fi
  if [ $present = yes ]; then
    warn "$1: what is there is not complete ($found); move it away and run again"
    return 1
  fi
  [ -n "$python" ] || stop 1 "needs python to generate $1; activate the environment or set PYTHON"
  say "$1: generating"
  if ! run "$python" "$here/generate_lra.py" "$1" --out "$dir" --seed 0; then
    warn "$1: generate_lra.py failed; its message is above"
    return 1
  fi
}

get_listops() { generate listops; }
get_pathfinder32() { generate pathfinder32; }

get_aan() {
  if is_usable aan; then
    say "aan: complete, left alone"
    return 0
  fi
  cat >&2 <<END
get_lra_data.sh: aan: not usable ($found), and its texts may not be redistributed.
  Obtain them from the LRA release (folder tsv_data of lra_release.gz), which drew them from the
  ACL Anthology Network, https://clair.eecs.umich.edu/aan/, and put them here:
  $(release_folder "$dir" tsv_data)/new_aan_pairs.{train,eval,test}.tsv
END
  return 1
}

main() {
  local check=false asked=" " name
  local names=()
  while [ $# -gt 0 ]; do
    case $1 in
      cifar10 | imdb | listops | pathfinder32 | aan) asked="$asked$1 " ;;
      lra_release | all) asked="$asked$1 " ;;
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
    asked=" all "
  fi
  case $asked in *" all "*) asked=" cifar10 imdb lra_release aan " ;; esac
  if ! $check; then
    enter
    for name in cifar10 imdb lra_release listops pathfinder32 aan; do
      case $asked in *" $name "*) "get_$name" || true ;; esac
    done
  fi
  asked=${asked/ lra_release / listops pathfinder32 aan }
  for name in cifar10 imdb listops pathfinder32 aan; do
    case $asked in *" $name "*) names+=("$name") ;; esac
  done
  report "${names[@]}" # its status is ours
}

main "$@"
