# %% What the trials are made of
from tool_packs.introspection import BASELINES, PROTOCOL

WORDS = [
    "dust", "satellite", "trumpet", "origami", "illusion", "camera", "lightning", "constellation",
    "treasure", "phone", "tree", "avalanche", "mirror", "fountain", "quarry", "sadness", "xylophone",
    "secrecy", "ocean", "happiness", "deserts", "kaleidoscope", "sugar", "vegetable", "poetry",
    "aquarium", "bag", "peace", "cavern", "memory", "volcano", "blood",
]  # fmt: skip
BASELINES = [
    word for word in BASELINES if word not in WORDS
]  # a concept's vector is what it has beyond their mean
TELL = "Tell me about {concept}."
ASK, START = (
    PROTOCOL,
    "Trial {i}",
)  # injected from the first token of this on, and while the answer is generated
UNRELATED = [
    *PROTOCOL[:2],
    {"role": "user", "content": "Trial {i}: What is the capital of France?"},
]
UNRELATED_START = "Trial {i}"
LAYERS, STRENGTHS = [0.6, 0.7, 0.8], [1.0, 2.0, 4.0]
LENGTH = 60  # tokens of an answer
