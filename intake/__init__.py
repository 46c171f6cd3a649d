"""The only room that touches a stranger's bytes: in a fence, without torch, and out come safetensors and JSON."""
