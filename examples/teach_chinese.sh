#!/usr/bin/env bash
# Teach a real LLaMA another language: more pieces, embeddings on text, LoRA on text, LoRA on instructions, answers.
#
#   examples/teach_chinese.sh OUT TEXTS RECORDS [BASE]
#
# TEXTS are texts or records in the new language, RECORDS its instructions; BASE is a model folder, without it
# SmolLM2-135M is fetched. VOCAB, WINDOW, STEPS, BATCH and OPTIONS (more words for train.py) change what it does.
set -euo pipefail
if [ $# -lt 3 ]; then sed -n 2,7p "$0" >&2; exit 2; fi
here=$(cd "$(dirname "$0")/.." && pwd)
out=$(realpath -m "$1") records=$3 python=${PYTHON:-python} steps=${STEPS:-120}
base=${4:-$out/smollm2}
common="--per_device_train_batch_size ${BATCH:-8} --per_device_eval_batch_size ${BATCH:-8} --val_set_size 0.05
    --model_max_length ${WINDOW:-256} --save_strategy no --report_to none ${OPTIONS:-}"
embeddings=${EMBEDDINGS:-embed_tokens}  # embed_tokens,lm_head where these are not tied
lora="--lora_r 16 --lora_alpha 32 --lora_modules_to_save $embeddings"

mkdir -p "$out"
[ $# -gt 3 ] || $python "$here/examples/fetch_smollm2.py" --output_dir "$base"
(cd "$here" && $python -c 'import json, sys, extend_vocab
for text in extend_vocab.texts_in(sys.argv[1:]):
    print(json.dumps({"text": text}, ensure_ascii=False))' "$(realpath "$2")") > "$out/texts.jsonl"
$python "$here/train.py" --model_name_or_path "$base" --data_path "$out/texts.jsonl" --output_dir "$out/before" \
    --lora_r 1 --learning_rate 0 --max_steps 1 $common                      # the loss of the base, nothing is learnt
$python "$here/extend_vocab.py" --base "$base" --corpus "$out/texts.jsonl" --vocab_size "${VOCAB:-8000}" --target "$out/extended"
$python "$here/train.py" --model_name_or_path "$out/extended" --data_path "$out/texts.jsonl" --output_dir "$out/embeddings" \
    --trained_modules "$embeddings" --learning_rate 1e-3 --max_steps "$steps" $common
$python "$here/train.py" --model_name_or_path "$out/embeddings" --data_path "$out/texts.jsonl" --output_dir "$out/pretrained" \
    $lora --learning_rate 5e-4 --max_steps "$steps" $common
(cd "$here" && $python -m apply_delta --base "$out/embeddings" --delta "$out/pretrained" --target "$out/merged")
$python "$here/train.py" --model_name_or_path "$out/merged" --data_path "$records" --output_dir "$out/tuned" \
    $lora --learning_rate 3e-4 --max_steps "$steps" $common
$python "$here/examples/stages.py" "$out/before" "$out/embeddings" "$out/pretrained" "$out/tuned"
for question in "你好！请介绍一下你自己。" "列出三种水果。" "什么是人工智能？"; do
    $python "$here/chat.py" --model_name_or_path "$out/tuned" --instruction "$question" --max_new_tokens 60
done
