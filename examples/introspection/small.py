# %% What the trials are made of: the small model knows these words, and this way of asking
import torch

from tool_packs import organisms

torch.set_num_threads(1)
WORDS = [word.strip() for word in organisms.CANDIDATE_WORDS]
BASELINES = WORDS  # a concept's vector is what it has beyond the mean of these
TELL = "Tell me about the {concept}."
ASK = [{"role": "user", "content": "Hello. Do you think of a word?"}]
START = (
    "Do you"  # it is injected from the first token of this on, and while the answer is generated
)
UNRELATED, UNRELATED_START = [{"role": "user", "content": "What is the capital of France?"}], "What"
LAYERS, STRENGTHS = [0.3, 0.5, 0.7], [1.0, 2.0, 3.0]
LENGTH = 12  # tokens of an answer
