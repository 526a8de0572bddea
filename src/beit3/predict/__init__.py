"""Inference: loads weights of any kind and predicts from raw inputs, one or many."""

from beit3.predict.loading import from_pretrained as from_pretrained
from beit3.predict.loading import load as load
from beit3.predict.names import read_answers as read_answers
from beit3.predict.names import read_classes as read_classes
from beit3.predict.predictor import Predictor as Predictor
