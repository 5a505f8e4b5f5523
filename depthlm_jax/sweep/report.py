def write(*a): return {}
def line(*a): return ""
