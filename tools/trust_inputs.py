def trials(home, share):
    return []
