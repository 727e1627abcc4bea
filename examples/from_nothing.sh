#!/usr/bin/env bash
# From nothing to a model that answers, offline: a tokenizer, random weights, pretraining on text, tuning, an answer.
#
#   examples/from_nothing.sh OUT TEXTS RECORDS
#
# TEXTS is a .txt file, records {"text"} or a folder of them; RECORDS are Alpaca's, or conversations. PRESET, VOCAB,
# WINDOW, TEXT_STEPS, TUNE_STEPS, BATCH, HELD_OUT and OPTIONS (more words for train.py) change what it does.
set -euo pipefail
if [ $# -ne 3 ]; then sed -n 2,8p "$0" >&2; exit 2; fi
here=$(cd "$(dirname "$0")/.." && pwd)
out=$(realpath -m "$1") texts=$2 records=$3 python=${PYTHON:-python}
common="--per_device_train_batch_size ${BATCH:-16} --per_device_eval_batch_size ${BATCH:-16} --lr_scheduler_type cosine --warmup_steps 0.05 --save_strategy no --report_to none ${OPTIONS:-}"

$python "$here/examples/train_tokenizer.py" --data_path "$texts" --vocab_size "${VOCAB:-4000}" --output_dir "$out/tokenizer"
$python "$here/train.py" --config_name "${PRESET:-baby_llama2}" --tokenizer_name "$out/tokenizer" --data_path "$texts" \
    --output_dir "$out/pretrained" --val_set_size 0.05 --model_max_length "${WINDOW:-256}" --learning_rate 1e-3 --max_steps "${TEXT_STEPS:-200}" $common
$python "$here/train.py" --model_name_or_path "$out/pretrained" --data_path "$records" \
    --output_dir "$out/tuned" --val_set_size "${HELD_OUT:-100}" --model_max_length "${WINDOW:-256}" --learning_rate 5e-4 --max_steps "${TUNE_STEPS:-100}" $common
$python "$here/examples/stages.py" "$out/pretrained" "$out/tuned"
for question in "What is a river?" "Name three colors."; do
    $python "$here/chat.py" --model_name_or_path "$out/tuned" --instruction "$question" --max_new_tokens 40
done
