"""The numbers of a model that its memory follows from."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Linear:
    """An adapted linear: the last part of its name, its layer, and its widths."""

    name: str
    layer: int
    inputs: int
    outputs: int


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder's shapes. Counts of parameters are in elements; tied weights count once."""

    parameters: int
    small_parameters: int
    """In tensors so small that ZeRO-3 leaves them whole on every worker."""
    trained: int
    """What mode full trains."""
    trained_tensors: int
    small_trained: tuple[int, ...]
    """Those of what is trained that are small."""
    backward_parameters: int
    """Those that are not small, of what a backward goes through: the head, and layers down to the first with anything
    to learn in it."""
    recomputed_parameters: int
    """The same of layers alone, without the last tensor of each."""
    tied_forward: int
    """Of the head, if its matrix is the embeddings', too, and so is used at both ends of a forward; else 0."""
    tied_backward: int
    """The same for a backward that goes down to the embeddings."""
    layer_parameters: int
    """Of all layers together: without embeddings, head and the last norm."""
    largest_layer: int
    embedding: int
    """The token embeddings, or the output head: one of the two, where they are not tied."""
    layers: int
    hidden: int
    intermediate: int
    query_width: int
    """Query heads times the width of a head."""
    key_width: int
    """Key heads times the width of a head; the values' is the same."""
    heads: int
    vocabulary: int
    adapted: tuple[Linear, ...]
    """Linears with an adapter; none in mode full."""
    first_layer: int
    """Where the backward ends: the first layer with anything to learn in it, or below it."""
    is_measured: bool
    """The formula for activations was checked against layers of this kind; for others it is an estimate."""

    prompt: int = 0
    """Elements of a soft prompt, where that is what is learned."""

    def adapter(self, rank: int) -> int:
        """Return the elements of one adapter: `A [r, in]` and `B [out, r]` of every adapted linear; or of a prompt."""
        return self.prompt + rank * sum(linear.inputs + linear.outputs for linear in self.adapted)
