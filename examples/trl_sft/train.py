"""Fine-tune a small Llama with TRL's SFTTrainer. The JSON alone decides whether MiCS runs.

torchrun --nproc_per_node 4 train.py
"""

import sysconfig
from pathlib import Path

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

HERE = Path(__file__).parent
CONTEXT = 64


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each byte. A real job loads its model's: AutoTokenizer.from_pretrained."""
    words = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def texts() -> Dataset:
    """Return short pieces of the standard library's source."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:3]
    lines = [line for path in paths for line in path.read_text().splitlines() if len(line) > 20]
    return Dataset.from_list([{"text": line[: CONTEXT - 2]} for line in lines[:256]])


def main() -> None:
    arguments = SFTConfig(
        output_dir="out",
        deepspeed=str(HERE / "ds_config.json"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=6,
        max_length=CONTEXT,
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=False,
    )
    tokenizer = byte_tokenizer()
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    set_seed(0)  # the same weights in every run
    model = AutoModelForCausalLM.from_config(shape)  # or the name of a model, as SFTTrainer's argument
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=texts(), processing_class=tokenizer)
    trainer.train()
    if trainer.is_world_process_zero():
        for entry in trainer.state.log_history:
            if "loss" in entry:
                print(f"step {entry['step']} loss {entry['loss']:.6f}", flush=True)


if __name__ == "__main__":
    main()
