"""What the converters of BLIP and mPLUG share: tensor names of BERT's text stacks (see `convert.rules` for the lines)."""

EMBEDDINGS = (
    ("leaf", "embeddings.word_embeddings.weight", "embed/word", "V D"),
    ("leaf", "embeddings.position_embeddings.weight", "embed/position", "T D"),
    ("norm", "embeddings.LayerNorm", "embed/norm", "D"),
)
SELF_ATTENTION = (
    ("dense", "encoder.layer.{}.attention.self.query", "blocks/self_attention/query", "D D"),
    ("dense", "encoder.layer.{}.attention.self.key", "blocks/self_attention/key", "D D"),
    ("dense", "encoder.layer.{}.attention.self.value", "blocks/self_attention/value", "D D"),
    ("dense", "encoder.layer.{}.attention.output.dense", "blocks/self_attention/out", "D D"),
    ("norm", "encoder.layer.{}.attention.output.LayerNorm", "blocks/self_norm", "D"),
)
CROSS_ATTENTION = (
    ("dense", "encoder.layer.{}.crossattention.self.query", "blocks/cross_attention/query", "D D"),
    ("dense", "encoder.layer.{}.crossattention.self.key", "blocks/cross_attention/key", "D C"),
    ("dense", "encoder.layer.{}.crossattention.self.value", "blocks/cross_attention/value", "D C"),
    ("dense", "encoder.layer.{}.crossattention.output.dense", "blocks/cross_attention/out", "D D"),
    ("norm", "encoder.layer.{}.crossattention.output.LayerNorm", "blocks/cross_norm", "D"),
)
MLP = (
    ("dense", "encoder.layer.{}.intermediate.dense", "blocks/mlp/up", "F D"),
    ("dense", "encoder.layer.{}.output.dense", "blocks/mlp/down", "D F"),
    ("norm", "encoder.layer.{}.output.LayerNorm", "blocks/mlp_norm", "D"),
)
TEXT = (*EMBEDDINGS, *SELF_ATTENTION, *CROSS_ATTENTION, *MLP)
HEAD = (
    ("dense", "cls.predictions.transform.dense", "head/dense", "D D"),
    ("norm", "cls.predictions.transform.LayerNorm", "head/norm", "D"),
    ("leaf", "cls.predictions.bias", "head/bias", "V"),
)
UNTIED = ("matrix", "cls.predictions.decoder", "head/vocabulary", "V D")  # if it is not the word embedding
TIED = {  # second name of a tensor -> the name that is kept
    "text_decoder.cls.predictions.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
}
DROPPED = ((r"embeddings\.position_ids$", "a buffer: the numbers 0, 1, 2, ..."),)
