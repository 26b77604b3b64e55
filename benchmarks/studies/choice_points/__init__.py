"""Why further tokens may help: identity and weights of section 5 and appendix L, exactly."""
