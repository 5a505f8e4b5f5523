"""A whole model over a packed batch: images into the text, decoder, head; and decoding with a cache."""

import jax
import jax.numpy as jnp
from flax import nnx

from depthlm_jax.models.attention import Among, masked
from depthlm_jax.models.decoder import Cache, Decoder, DecoderLayer
from depthlm_jax.models.execution import Execution
from depthlm_jax.models.layers import Linear, Turn, scan_layers


class VisionLanguage(nnx.Module):
    """Shared by the families. Each sets `how` and gives the four methods at the end."""

    how: Execution

    def logits(self, batch: dict[str, jax.Array]) -> jax.Array:
        """Returns logits_BAV, float32: at each answer slot, of the token after it."""
        hidden_BTD, _ = self.decode_all(batch, keep_cache=False)
        return self.answer_logits(hidden_BTD, batch)

    def prefill(self, batch: dict[str, jax.Array], new_slots: int) -> tuple[jax.Array, Cache]:
        """Returns logits_BAV, and the cache with `new_slots` free slots after the T of the prompt."""
        hidden_BTD, cache = self.decode_all(batch, keep_cache=True)
        cache = jax.tree.map(lambda a: jnp.pad(a, ((0, 0), (0, 0), (0, new_slots), (0, 0), (0, 0))), cache)
        return self.answer_logits(hidden_BTD, batch), cache

    def decode_one(self, tokens_BQ, positions_BQ, slot, seen_BQS, cache: Cache) -> tuple[jax.Array, Cache]:
        """Returns logits_BQV of the token after each of `tokens_BQ`, and the cache with Q slots filled from `slot` on.

        Args:
          tokens_BQ: the tokens decoded last; Q = 1, or as many as continue a prompt side by side.
          positions_BQ: their positions, the same on all axes that positions have.
          slot: first of the Q cache slots that they take, a scalar for all rows.
          seen_BQS: cache slots that each attends to, its own included.
          cache: of `prefill`, or of the call before.
        """
        turn, decoder = self.turn(jnp.repeat(positions_BQ[..., None], 3, axis=-1)), self.decoder()

        def attend(q_BQNK, k_BSNK, v_BSNK):
            return masked(q_BQNK, k_BSNK, v_BSNK, seen_BQS)

        def step(layer: DecoderLayer, hidden_BQD, _, layer_cache: Cache):
            return layer(hidden_BQD, turn, attend, layer_cache, slot)

        hidden_BQD = decoder.embed_tokens(tokens_BQ)
        hidden_BQD, cache = scan_layers(decoder.layers, step, hidden_BQD, per_layer=cache, remat="none")
        return self.head(decoder.norm(hidden_BQD)), cache

    def decode_all(self, batch: dict[str, jax.Array], keep_cache: bool) -> tuple[jax.Array, Cache | None]:
        """Returns hidden_BTD after the last norm, and every layer's keys and values if asked for."""
        turn, decoder = self.turn(batch["positions_BTZ"]), self.decoder()
        before = Among(batch["segments_BT"], batch["branch_BT"], causal=True)

        def attend(q_BTNK, k_BTNK, v_BTNK):
            return self.how.attend(q_BTNK, k_BTNK, v_BTNK, before)

        def step(layer: DecoderLayer, hidden_BTD, *_):
            hidden_BTD, cache = layer(hidden_BTD, turn, attend)
            return self.how.constrain(hidden_BTD, "BTD"), cache if keep_cache else None

        hidden_BTD = self.how.constrain(self.embed(batch), "BTD")
        remat = "none" if keep_cache else self.how.remat
        hidden_BTD, cache = scan_layers(decoder.layers, step, hidden_BTD, remat=remat, unroll=self.how.unroll)
        return decoder.norm(hidden_BTD), cache

    def embed(self, batch: dict[str, jax.Array]) -> jax.Array:
        """Returns token embeddings, with the row's merged patches where `vision_index_BT` names one."""
        merged_BMD = self.see(batch["patches_BPC"], batch["patch_rc_BP2"], batch["image_id_BP"])
        index_BT1 = batch["vision_index_BT"][..., None]
        seen_BTD = jnp.take_along_axis(merged_BMD, jnp.maximum(index_BT1, 0), axis=1)
        # Gathered whole: a table that is divided along D would be looked up for all rows on every device.
        table_VD = self.how.constrain(self.decoder().embed_tokens.embedding[...], "V.")
        words_BTD = self.how.constrain(jnp.take(table_VD, batch["tokens_BT"], axis=0), "BTD")
        return jnp.where(index_BT1 >= 0, seen_BTD, words_BTD)

    def answer_logits(self, hidden_BTD: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
        """Returns logits_BAV; the vocabulary is multiplied with answer slots only."""
        return self.head(jnp.take_along_axis(hidden_BTD, batch["answer_index_BA"][..., None], axis=1))

    def head(self, hidden_BAD: jax.Array) -> jax.Array:
        """Returns logits_BAV, summed in float32 whatever the dtype of the factors."""
        untied = self.untied_head()
        if untied is None:
            kernel_VD = self.decoder().embed_tokens.embedding[...]
            logits_BAV = jnp.einsum("bad,vd->bav", hidden_BAD, kernel_VD, preferred_element_type=jnp.float32)
        else:
            logits_BAV = untied(hidden_BAD, jnp.float32)
        return self.how.constrain(logits_BAV, "BAV")

    def decoder(self) -> Decoder:
        """Returns the language model without its head."""
        raise NotImplementedError

    def untied_head(self) -> Linear | None:
        """Returns the head; None: it is the embedding."""
        raise NotImplementedError

    def see(self, patches_BPC: jax.Array, patch_rc_BP2: jax.Array, image_id_BP: jax.Array) -> jax.Array:
        """Returns merged_BMD, what the decoder sees of each merged patch, in the order of the patch slots.

        Args:
          patches_BPC: uint8, one channel plane after another, as HF flattens a frame of a patch.
          patch_rc_BP2: row and column of the patch in its image.
          image_id_BP: from 1; 0 = padding.
        """
        raise NotImplementedError

    def turn(self, positions_BTZ: jax.Array) -> Turn:
        """Returns the rotation of queries and keys at these positions."""
        raise NotImplementedError
