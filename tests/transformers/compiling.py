"""The ways in which people compile a transformers model or parts of it."""

import torch


def compile_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")


def compile_in_place(model):
    model.compile(backend="eager")


def compile_base(model):
    model.base_model.compile(backend="eager")


def compile_decoder(model):
    model.base_model.language_model = torch.compile(model.get_decoder(), backend="eager")


def compile_layers(model):
    for layer in model.get_decoder().layers:
        layer.compile(backend="eager")


WAYS_TO_COMPILE = [
    compile_forward,
    compile_in_place,
    compile_base,
    compile_decoder,
    compile_layers,
]
