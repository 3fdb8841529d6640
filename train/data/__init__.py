"""From files to batches: sources, tokenizers, packing and the resumable order of training windows."""

from train.data.batches import TrainingBatches, num_validation_batches, validation_batches
from train.data.corpus import Corpus, content_hash, load_corpus
from train.data.packing import TokenStream
from train.data.tokenizer import StreamDecoder, Tokenizer
from train.data.tokenizer_files import build_tokenizer, load_tokenizer

__all__ = [
    "Corpus",
    "StreamDecoder",
    "TokenStream",
    "Tokenizer",
    "TrainingBatches",
    "build_tokenizer",
    "content_hash",
    "load_corpus",
    "load_tokenizer",
    "num_validation_batches",
    "validation_batches",
]
