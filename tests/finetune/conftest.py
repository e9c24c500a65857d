from tests.workflow.fixtures import compressed, held_out, one_thread, text

__all__ = ["compressed", "held_out", "one_thread", "text"]
