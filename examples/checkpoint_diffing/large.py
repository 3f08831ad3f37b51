# %% Both checkpoints answer the same prompts, and the first one twice
import asyncio
import os
import random

from datasets import load_dataset
from openai import AsyncOpenAI

client = AsyncOpenAI(api_key=os.environ["OPENROUTER_API_KEY"])  # OPENAI_BASE_URL says where
rows = load_dataset("tatsu-lab/alpaca", split="train").select(range(3000))
prompts = [row["instruction"] for row in rows if not row["input"]]
random.Random(0).shuffle(prompts)
# A hypothesis is made on the first and tested on the others
EXPLORED, FRESH = prompts[:150], prompts[150:250]
LENGTH = 300  # tokens of an answer
slots = asyncio.Semaphore(16)


async def answer(model, prompt):
    async with slots:
        done = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": prompt}],
            max_tokens=LENGTH,
            temperature=1.0,
        )
    return done.choices[0].message.content or ""


A, B = os.environ["CHECKPOINT_A"], os.environ["CHECKPOINT_B"]
ARMS = {"a": A, "b": B, "a again": A}


async def answers(asked):
    return {
        arm: await asyncio.gather(*(answer(model, p) for p in asked)) for arm, model in ARMS.items()
    }


DOCS, fresh = await answers(EXPLORED), await answers(FRESH)
for prompt, *said in list(zip(EXPLORED, *DOCS.values(), strict=True))[:3]:
    print(prompt, *(text[:200] for text in said), sep="\n  ")

# %% The reader, and its public autoencoder
from pathlib import Path

from huggingface_hub import snapshot_download

from tool_packs import sae

READER = m
(file,) = Path(snapshot_download("Goodfire/Llama-3.1-8B-Instruct-SAE-l19")).glob("*.pt*")
SAE = sae.load(m, str(file), layer=19)
SAE
