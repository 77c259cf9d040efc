"""The reference policy: ways of adding reference log-probs to a batch. The loss cannot tell which one did."""
