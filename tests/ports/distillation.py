"""Distillation: a small network learns from a large one, which a run of its own has trained."""

import keras
from keras import layers, ops

from src.data import get_digits


def make_network(filters, name):
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(filters, 3, strides=2, padding="same", activation="leaky_relu"),
            layers.Conv2D(2 * filters, 3, strides=2, padding="same"),
            layers.Flatten(),
            layers.Dense(10),
        ],
        name=name,
    )


class Distiller(keras.Model):
    def __init__(self, student, teacher):
        super().__init__()
        self.teacher = teacher
        self.student = student

    def compile(self, optimizer, metrics, student_loss, distillation_loss, alpha, temperature):
        super().compile(optimizer=optimizer, metrics=metrics)
        self.student_loss = student_loss
        self.distillation_loss = distillation_loss
        self.alpha, self.temperature = alpha, temperature

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, allow_empty=False):
        teacher_pred = self.teacher(x, training=False)
        student_loss = self.student_loss(y, y_pred)
        distillation_loss = self.distillation_loss(
            ops.softmax(teacher_pred / self.temperature, axis=1),
            ops.softmax(y_pred / self.temperature, axis=1),
        ) * (self.temperature**2)
        return self.alpha * student_loss + (1 - self.alpha) * distillation_loss

    def call(self, x):
        return self.student(x)


def make_teacher():
    model = make_network(16, "teacher")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["sparse_categorical_accuracy"])
    return model


def make_distiller(teacher):
    teacher.trainable = False
    model = Distiller(make_network(4, "student"), teacher)
    model.compile(
        optimizer="adam",
        metrics=["sparse_categorical_accuracy"],
        student_loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        distillation_loss=keras.losses.KLDivergence(),
        alpha=0.1,
        temperature=10,
    )
    return model


# ---- ported ------------------------------------------------------------------------------------


def data(config):
    return get_digits(config)


def build_teacher(config):
    return make_teacher()


def build(config):
    return make_distiller(make_teacher())
