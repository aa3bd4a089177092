"""Tells the eke registry what this distribution provides."""

from eke import Technique, hookimpl

RECORD = Technique(
    name="mae",
    kind="callback",
    factory="eke_mae:MAE",
    paper="https://arxiv.org/abs/2111.06377",
    does="Masked image pretraining of your own ViT: MAE, SimMIM and BEiT-style prediction",
    topics=("token masking",),
    survey=("mae", "mim"),
    effects=("changes module tree", "replaces tokens", "changes hidden states", "replaces loss"),
    needs=("automatic optimization",),
    intolerance=(
        "Its decoder stands beside the model, where it would be sharded. Use one device, strategy='ddp' or "
        "ZeRO(stage=1), or leave it out."
    ),
    exactness="model-changing",
    exceptions={
        "test_accumulated_gradients_equal_the_big_batch": "Each micro-batch draws the masks of its own images, so two "
        "of them draw others than one batch of twice the size.",
        "test_two_processes_equal_one": "Each process draws the masks of its own images, so two of them draw others "
        "than one process does.",
        "test_its_checkpoint_loads_without_it_or_says_why_not": "The optimizer's state holds that of the decoder: take "
        "the weights (load_from_checkpoint), which load strictly, and begin a new run with them.",
        "test_it_costs_nothing_when_it_has_nothing_to_do": "There is no step in which it has nothing to do: the "
        "loss is its own.",
        "test_under_torch_compile_it_reaches_the_same_weights": "A head that no loss reaches has no gradient, and "
        "one of zeros in a model that is compiled as a whole, so that weight decay moves it there.",
    },
)

MODELS = ("TinyViT",)  # of the kit's


@hookimpl
def eke_technique() -> Technique:
    return RECORD
