"""vLLM with latent steps: a model class of its own that vLLM's plugin interface loads, no patch of its runner.

plugin.py         what vLLM calls in each of its processes
compatibility.py  what is relied upon beyond vLLM's public interface, checked at the start
model_folder.py   from a policy's folder to one that vLLM loads
model.py          the model classes
projector.py      the Reasoning Projector, tensor-parallel
position_automaton.py  the marker automaton over vLLM's tokens
latent_steps.py   one forward with latent positions in it
step.py           what vLLM computes in one forward
ragged_plan.py    the order of work where several positions of a sequence are computed at once
side_buffers.py   what is kept for each block of the KV cache
latent_records.py the latents of each request, for the trainer
worker.py         methods that the engine's client calls in the workers
reload.py         new weights into a running engine
stream.py         the client's side: prompts in, completions and latent spans out

Latent steps are positions in vLLM's stream of tokens, all with one reserved token id. What is relied upon of
vLLM was read and run in the versions that `compatibility.TESTED` names.
"""
