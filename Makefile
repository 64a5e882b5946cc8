# Every target makes .venv and installs what it needs. `make demo` first.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
WITH_VENV = PATH="$(CURDIR)/$(BIN):$$PATH"
# A machine with an NVIDIA driver takes the registry's CUDA build of torch, any other the CPU build (200 MB, not 3 GB).
# Where that index cannot be reached pip goes on with the registry. TORCH_INDEX= (empty) switches it off.
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi 2>/dev/null),,https://download.pytorch.org/whl/cpu)
TORCH = $(shell grep '^torch==' requirements.txt)
DEEPSPEED = $(shell grep '^deepspeed==' requirements.txt)

# What may be given: make train-t5-small TRAIN_FILE=mine.csv MODEL=/models/t5-small EXTRA="--max_steps 100"
MODEL ?=
EXTRA ?=
DATA ?= data
OUT ?= out
TRAIN_FILE ?= $(DATA)/train.csv
VALIDATION_FILE ?= $(DATA)/validation.csv
REVIEWS ?= $(DATA)/reviews.tsv.gz
INSTRUCTIONS ?= databricks-dolly-15k.jsonl
INSTRUCT_DATA ?= data/instruct

.PHONY: demo demo-instruct demo-real
.PHONY: test test-slow test-real test-gpu test-launchers test-try test-versions chaos damages lost-ranks bad-inputs
.PHONY: hooks quality style fix-copies clean
.PHONY: prep-reviews prep-instruct
.PHONY: train-t5-small train-t5-large train-t5-11b train-llama2-7b train-llama3-8b
.PHONY: generate summarize-products serve try
.PHONY: copy size-table
.PHONY: bench-training bench-instruct bench-generation bench-start-up bench-adafactor bench-gpu

# A tiny T5 made here, on synthetic reviews made here: two CPU processes of ZeRO-3, or the GPUs that are there.
demo: $(VENV)/.core
	$(WITH_VENV) python demo.py

# A tiny Llama made here on questions made here, packed; it answers and stops.
demo-instruct: $(VENV)/.core
	$(WITH_VENV) python demo_instruct.py

# A real pretrained model out of the Python registry (93 MB), LoRA on the same questions.
demo-real: $(VENV)/.core
	$(WITH_VENV) python demo_real.py

# ------------------------------------------------------------------------------------------------ environment

$(VENV)/.core: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q setuptools wheel ninja packaging
	$(BIN)/python -m pip install -q --retries 0 $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(TORCH)
	grep -v '^deepspeed' requirements.txt > $(VENV)/requirements.txt
	$(BIN)/python -m pip install -q -r $(VENV)/requirements.txt
	$(BIN)/python -m pip install -q --no-build-isolation $(DEEPSPEED)
	touch $@

$(VENV)/.dev: $(VENV)/.core requirements-dev.txt
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	touch $@

OPTIONAL = requirements-launchers.txt requirements-delta.txt requirements-tracking.txt
$(VENV)/.launchers: $(VENV)/.dev $(OPTIONAL)
	$(BIN)/python -m pip install -q $(addprefix -r ,$(OPTIONAL))
	touch $@

$(VENV)/.try: $(VENV)/.core requirements-try.txt
	$(BIN)/python -m pip install -q -r requirements-try.txt
	touch $@

# ------------------------------------------------------------------------------------------------ tests and style

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n 2 --durations=12

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m slow

# On a real pretrained model out of the Python registry (93 MB); PLAINTUNE_REAL_MODEL=folder takes one that is there.
test-real: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m real --durations=8

test-gpu: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m gpu

# Runs killed at random moments and started again, compared with runs never killed; EXTRA="--only zero3 --seed 2".
KILLS ?= 100
chaos: $(VENV)/.dev
	$(BIN)/python tests/chaos.py --kills $(KILLS) $(EXTRA)

# A rank stopped, killed, taken off the network, under each launcher: seconds until that is said.
lost-ranks: $(VENV)/.launchers
	$(BIN)/python tests/lost_ranks.py $(EXTRA)

# Every file that a training leaves damaged in four ways, one at a time, and the training started again.
damages: $(VENV)/.dev
	$(BIN)/python tests/damages.py $(EXTRA)

# The page of `make try`, with Streamlit and in a real browser (Debian: chromium and chromium-driver).
test-try: $(VENV)/.dev $(VENV)/.try
	$(BIN)/python -m pytest -q -m try_page

# Real Spark, real Ray, real MLflow with its server, two hosts in network namespaces.
test-launchers: $(VENV)/.launchers
	$(BIN)/python -m pytest -q -m launchers --durations=8

# COUNT bad inputs, made of the scripts' own flags and files; what they end in, and which were accepted.
COUNT ?= 2000
bad-inputs: $(VENV)/.dev
	HF_HUB_OFFLINE=1 $(BIN)/python tests/bad_inputs.py --count $(COUNT) $(EXTRA)

# The scripts' tests on another transformers than the pinned one, with what it resolves to; 5.23 is the oldest that passes.
VERSIONS ?= 5.24.0
test-versions: $(VENV)/.dev
	for version in $(VERSIONS); do folder=$(VENV)/transformers-$$version; \
	    [ -d $$folder ] || $(BIN)/python -m pip install -q --target $$folder transformers==$$version || exit 1; \
	    PYTHONPATH=$$folder $(BIN)/python -m pytest -q -n 2 $(EXTRA) tests/test_run_summarization.py \
	        tests/test_run_clm_instruct.py tests/test_run_generation.py tests/test_zero_adafactor.py || exit 1; done

quality: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# `make quality` before each commit.
hooks: $(VENV)/.dev
	$(BIN)/pre-commit install

style: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Scripts stand alone, so what they share is there twice: carries it from one, FROM=run_summarization.py, to the others.
fix-copies:
	$(PYTHON) tests/fix_copies.py $(FROM)

clean:
	rm -rf demo demo_instruct demo_real .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# ------------------------------------------------------------------------------------------------ data
# The commands of the targets from here on to `copy` stand in README.md as well; a test holds that they are the same.

prep-reviews: $(VENV)/.core
	$(BIN)/python data_prep/prepare_reviews.py --input_file $(REVIEWS) --output_dir $(DATA) --drop_star_headlines $(EXTRA)

prep-instruct: $(VENV)/.core
	$(BIN)/python data_prep/prepare_instruct.py --input_file $(INSTRUCTIONS) --output_dir $(INSTRUCT_DATA) $(EXTRA)

# ------------------------------------------------------------------------------------------------ training

REVIEW_FLAGS = --do_train --do_eval --train_file $(TRAIN_FILE) --validation_file $(VALIDATION_FILE) \
	--source_prefix "summarize: " --max_source_length 256 --max_target_length 64 --predict_with_generate --optim adafactor --bf16
INSTRUCT_FLAGS = --do_train --do_eval --train_file $(INSTRUCT_DATA)/train.jsonl \
	--validation_file $(INSTRUCT_DATA)/validation.jsonl --max_eval_samples 500 --packing --bf16 --activation_checkpointing

train-t5-small: $(VENV)/.core
	$(BIN)/python run_summarization.py \
		--model_name_or_path $(or $(MODEL),t5-small) $(REVIEW_FLAGS) --num_train_epochs 8 \
		--per_device_train_batch_size 64 --per_device_eval_batch_size 64 --output_dir $(OUT)/t5-small \
		--run_name t5-small-fine-tune-reviews $(EXTRA)

train-t5-large: $(VENV)/.core
	$(WITH_VENV) deepspeed run_summarization.py --deepspeed ds_configs/zero2.json \
		--model_name_or_path $(or $(MODEL),t5-large) $(REVIEW_FLAGS) --activation_checkpointing --num_train_epochs 8 \
		--per_device_train_batch_size 20 --per_device_eval_batch_size 20 --output_dir $(OUT)/t5-large \
		--run_name t5-large-fine-tune-reviews $(EXTRA)

train-t5-11b: $(VENV)/.core
	$(WITH_VENV) deepspeed run_summarization.py --deepspeed ds_configs/zero3_offload.json \
		--model_name_or_path $(or $(MODEL),t5-11b) $(REVIEW_FLAGS) --activation_checkpointing --num_train_epochs 1 \
		--per_device_train_batch_size 8 --per_device_eval_batch_size 8 --output_dir $(OUT)/t5-11b \
		--run_name t5-11b-fine-tune-reviews $(EXTRA)

train-llama2-7b: $(VENV)/.core
	$(WITH_VENV) deepspeed run_clm_instruct.py --deepspeed ds_configs/zero3_offload_adamw.json \
		--model_name_or_path $(or $(MODEL),meta-llama/Llama-2-7b-chat-hf) $(INSTRUCT_FLAGS) --prompt_template dolly \
		--max_seq_length 1024 --learning_rate 1e-5 --warmup_steps 50 --num_train_epochs 2 \
		--per_device_train_batch_size 8 --per_device_eval_batch_size 8 --output_dir $(OUT)/llama2-7b \
		--run_name llama2-7b-dolly $(EXTRA)

train-llama3-8b: $(VENV)/.core
	$(BIN)/python run_clm_instruct.py \
		--model_name_or_path $(or $(MODEL),meta-llama/Meta-Llama-3-8B-Instruct) $(INSTRUCT_FLAGS) --prompt_template chat \
		--max_seq_length 2048 --learning_rate 2e-4 --num_train_epochs 2 --lora_r 16 --merge_lora \
		--per_device_train_batch_size 4 --per_device_eval_batch_size 8 --output_dir $(OUT)/llama3-8b \
		--run_name llama3-8b-dolly-lora $(EXTRA)

# ------------------------------------------------------------------------------------------------ generation

# MODEL, TABLE in, SUMMARIES out; EXTRA for decoding flags.
TABLE ?= $(VALIDATION_FILE)
SUMMARIES ?= $(OUT)/summaries.csv
PRODUCTS ?= $(OUT)/products.csv
generate: $(VENV)/.core
	$(BIN)/python run_generation.py --model_name_or_path $(or $(MODEL),$(OUT)/t5-small) --input_file $(TABLE) \
		--output_file $(SUMMARIES) --num_beams 4 --max_new_tokens 24 $(EXTRA)

summarize-products: $(VENV)/.core
	$(BIN)/python run_generation.py --model_name_or_path $(or $(MODEL),$(OUT)/t5-small) --input_file $(TABLE) \
		--output_file $(PRODUCTS) --group_by product_id --min_group_size 10 --num_beams 4 --max_new_tokens 24 $(EXTRA)

# Log MODEL (a training run's folder) to MLflow and serve it on loopback; without MODEL serve what was logged last.
SERVED ?= plaintune
PORT ?= 5001
serve: $(VENV)/.launchers
	$(if $(MODEL),MLFLOW_TRACKING_URI=$${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db} $(BIN)/python launchers/mlflow_model.py --model_dir $(MODEL) --registered_model_name $(SERVED) --port $(PORT))
	MLFLOW_TRACKING_URI=$${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db} $(WITH_VENV) \
		mlflow models serve --env-manager local -h 127.0.0.1 -p $(PORT) -m models:/$(SERVED)/latest

# A page in the browser for MODEL="out/t5-small out/t5-large": texts, chats, tables; PORT, if not 8501.
try: PORT = 8501
try: $(VENV)/.try
	$(BIN)/python tools/try_model.py --model_dir $(or $(MODEL),$(OUT)/t5-small) --port $(PORT) $(EXTRA)

# ------------------------------------------------------------------------------------------------ copying

# SCRIPT with its companions and the DS_CONFIGS asked for to the folder TO; nothing that differs is overwritten.
SCRIPT ?= run_summarization.py
DS_CONFIGS ?=
copy:
	$(PYTHON) tools/copy_script.py --script "$(SCRIPT)" --to "$(TO)" $(if $(DS_CONFIGS),--ds_configs $(DS_CONFIGS))

# ------------------------------------------------------------------------------------------------ sizes

# SIZES, names on the hub or folders of runs that have ended, trained alike and in one table; PRICE of an hour for costs.
SIZES ?= t5-small t5-base t5-large
PRICE ?=
size-table: $(VENV)/.core
	$(BIN)/python tools/size_table.py --sizes $(SIZES) --output_dir $(OUT)/sizes \
		--input_file $(VALIDATION_FILE) $(if $(PRICE),--price_per_hour $(PRICE)) -- $(REVIEW_FLAGS) --num_train_epochs 8 \
		--per_device_train_batch_size 16 --gradient_accumulation_steps 4 --per_device_eval_batch_size 32 $(EXTRA)

# ------------------------------------------------------------------------------------------------ benchmarks

# Against the stock trainers, side by side; EXTRA="--preset t5-large --precisions bf16 --steps 60" on a GPU.
bench-training: $(VENV)/.core
	$(BIN)/python benchmarks/training_speed.py $(EXTRA)

bench-instruct: $(VENV)/.core
	$(BIN)/python benchmarks/instruct_speed.py --train_file $(INSTRUCT_DATA)/train.jsonl \
		--validation_file $(INSTRUCT_DATA)/validation.jsonl $(EXTRA)

bench-generation: $(VENV)/.core
	$(BIN)/python benchmarks/generation_speed.py $(EXTRA)

# Seconds to the first step of a training and what they go to; EXTRA is the script and its arguments.
bench-start-up: $(VENV)/.core
	$(BIN)/python benchmarks/start_up.py $(EXTRA)

bench-adafactor: $(VENV)/.core
	$(BIN)/python benchmarks/adafactor_memory.py $(EXTRA)

# t5-11b with full parameters on one GPU: ZeRO-3 with ZeroAdafactor, with AdamW (runs out of memory on 141 GB), pure bf16.
bench-gpu: $(VENV)/.core
	$(BIN)/python benchmarks/adafactor_memory.py --fit t5-11b
