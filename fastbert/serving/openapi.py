def document(): return {}
def page(): return ""
