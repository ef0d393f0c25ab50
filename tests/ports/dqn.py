"""Deep Q-learning: an environment in Python, a memory of its steps, a network that is copied."""

import random

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

from engine.iterators import PyHookedModelIterator

NUM_ACTIONS, NUM_STATES, MEMORY, BATCH = 2, 8, 500, 16


class Corridor:
    """Steps to the right lead to the reward at its end; one to the left, back to its beginning."""

    def reset(self):
        self.place = 0
        return np.eye(NUM_STATES, dtype="float32")[0]

    def step(self, action):
        self.place = self.place + 1 if action == 1 else 0
        is_done = self.place == NUM_STATES - 1
        return np.eye(NUM_STATES, dtype="float32")[self.place], float(is_done), is_done


def create_q_model():
    hidden = layers.Dense(16, activation="relu")
    return keras.Sequential([keras.Input((NUM_STATES,)), hidden, layers.Dense(NUM_ACTIONS)])


class Agent:
    def __init__(self, config):
        self.model, self.model_target = create_q_model(), create_q_model()
        self.optimizer = keras.optimizers.Adam(0.005, clipnorm=1.0)
        self.optimizer.build(self.model.trainable_variables)
        self.env, self.memory, self.epsilon = Corridor(), [], 1.0
        self.state = self.env.reset()
        self.update = tf.function(self._update)

    def step(self, number):
        """Do one step in the environment; learn from some steps that are remembered."""
        self.epsilon = max(0.1, self.epsilon - 0.005)
        q_values = ops.convert_to_numpy(self.model(self.state[None]))[0]
        greedy = int(q_values.argmax())
        action = random.randrange(NUM_ACTIONS) if random.random() < self.epsilon else greedy
        state, reward, is_done = self.env.step(action)
        self.memory = [*self.memory, (self.state, action, reward, state, is_done)][-MEMORY:]
        self.state = self.env.reset() if is_done else state
        if number % 50 == 0:
            self.model_target.set_weights(self.model.get_weights())
        sample = random.choices(self.memory, k=BATCH)
        parts = (np.array(part, "float32") for part in zip(*sample, strict=True))
        return float(self.update(*parts))

    def play(self):
        """Return the reward of an episode without chance."""
        env, reward = Corridor(), 0.0
        state = env.reset()
        for _ in range(20):
            action = ops.convert_to_numpy(self.model(state[None]))[0].argmax()
            state, reward, is_done = env.step(action)
            if is_done:
                break
        return reward

    def _update(self, states, actions, rewards, next_states, dones):
        future = ops.max(self.model_target(next_states), axis=1)
        targets = rewards + 0.9 * future * (1 - dones)
        with tf.GradientTape() as tape:
            q_values = self.model(states)
            q_action = ops.sum(q_values * ops.one_hot(ops.cast(actions, "int32"), NUM_ACTIONS), 1)
            loss = ops.mean(keras.losses.huber(targets[:, None], q_action[:, None]))
        variables = self.model.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return loss


# ---- ported ------------------------------------------------------------------------------------


def steps(config):
    return [{"number": number} for number in range(100)]  # in an epoch


class DQN(PyHookedModelIterator):
    def step_ops(self):
        return lambda model, **_: model.step(self.get_global_step())

    def eval_op(self, model, number, **_):
        return {"labels": {"reward": np.full(len(number), model.play())}}


class SavedAgent(Agent):
    def get_state(self):
        return {"memory": self.memory, "epsilon": self.epsilon, "place": self.env.place}

    def set_state(self, state):
        self.memory, self.epsilon, self.env.place = state.values()
        self.state = np.eye(NUM_STATES, dtype="float32")[self.env.place]
