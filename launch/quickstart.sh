#!/usr/bin/env bash
# Set-up, then the main job on CPU: a small model learns to speak real recordings under DeepSpeed, and speaks them.
#   bash launch/quickstart.sh [--ranks N] [--stage 0|1|2|3] [--output_dir DIR] [--base_dtype nf4]
#       [--family v2|v3]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ranks=2 stage=2 output_dir=runs/quickstart base_dtype=none family=v2
usage() { echo "usage: bash launch/quickstart.sh [--ranks N] [--stage 0|1|2|3] [--output_dir DIR] [--base_dtype nf4] [--family v2|v3]" >&2; exit 2; }
while [ $# -gt 0 ]; do
  [ $# -ge 2 ] || usage
  case "$1" in
    --ranks) ranks=$2 ;;
    --stage) stage=$2 ;;
    --output_dir) output_dir=$2 ;;
    --base_dtype) base_dtype=$2 ;;
    --family) family=$2 ;;
    *) echo "unknown flag: $1" >&2; usage ;;
  esac
  shift 2
done
[[ "$stage" =~ ^[0-3]$ ]] || { echo "--stage: $stage is not a ZeRO stage (0 to 3)" >&2; exit 2; }
[[ "$family" =~ ^v[23]$ ]] || { echo "--family: $family is not v2 or v3" >&2; exit 2; }
[[ "$ranks" =~ ^[1-8]$ ]] || { echo "--ranks: $ranks is not 1 to 8" >&2; exit 2; }
source launch/setup.sh

speech=examples/speech/manifest.jsonl
if [ -e "$output_dir" ] && [ -n "$(ls -A "$output_dir")" ]; then
  kept="$output_dir-$(date +%Y%m%d-%H%M%S)"
  echo "quickstart: $output_dir holds an earlier run; it is kept as $kept"
  mv "$output_dir" "$kept"
fi
mkdir -p "$output_dir"
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=$(( $(nproc) > ranks ? $(nproc) / ranks : 1 ))
started=$SECONDS
step() { echo; echo "== $* ($((SECONDS - started)) s)"; }

step "1/4 a small random base checkpoint"
"$PYTHON" -m higgs_ds tiny --output_dir "$output_dir/base" --family "$family"

step "2/4 the sample codec, fitted on the shipped speech"
"$PYTHON" -m higgs_ds sample-codec --train_manifest "$speech" --output_dir "$output_dir/codec"

step "3/4 training: $ranks ranks, ZeRO-$stage"
port=$("$PYTHON" -c 'from higgs_ds.distributed.ports import free_port; print(free_port())')
deepspeed --num_accelerators "$ranks" --master_port "$port" train_ds.py \
  --config examples/quickstart.yaml --deepspeed_config "ds_configs/zero$stage.json" \
  --train_manifest "$speech" --val_manifest examples/speech/val.jsonl --codec "$output_dir/codec" \
  --base_ckpt "$output_dir/base" --batch_size $(( ranks < 8 ? 8 / ranks : 1 )) --output_dir "$output_dir" \
  --base_dtype "$base_dtype"

step "4/4 every training sentence, spoken and compared"
"$PYTHON" -m higgs_ds reproduce --base_ckpt "$output_dir/base" --adapter "$output_dir/adapter" \
  --codec "$output_dir/codec" --train_manifest "$speech" --output_dir "$output_dir/speech"

# Where the offline judges are installed (requirements-judge.txt), eight of the clips as they hear them.
judges="('jiwer', 'pocketsphinx', 'resemblyzer')"
if "$PYTHON" -c "from importlib.util import find_spec; exit(not all(map(find_spec, $judges)))"; then
  { "$PYTHON" -m higgs_ds judge --clips "$output_dir/speech" --manifest "$speech" --count 8 --output_dir "$output_dir/judged" \
    --words pocketsphinx --voice resemblyzer --sound none || true; } | awk -v at="$output_dir/judged/judged.jsonl" '
      $1 == "WER" { words = "WER " $5 " (recordings " $2 ")" }
      $1 == "similarity" { print "heard:  " words ", similarity " $5 " (recordings " $2 "): " at }'
fi

step "done"
"$PYTHON" -m higgs_ds report "$output_dir"
echo "look:   $output_dir/report.html (all of the run on one page), loss.png (curves), metrics.jsonl (numbers)"
echo "listen: $output_dir/speech/*.spoken.wav beside *.original.wav"
echo "speak:  DS_ACCELERATOR=cpu ${PYTHON#"$PWD"/} -m higgs_ds generate --base_ckpt $output_dir/base --adapter $output_dir/adapter \\"
echo "          --codec $output_dir/codec --text 'All circuits are busy now.' --output_file hello.wav"
echo "next:   your own voice on 8 GPUs: README.md, \"Your GPUs\""
