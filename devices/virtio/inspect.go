package virtio

import "gvm/inspect"

// Inspect returns how far each worker is, for Inspector.
func (ws Workers) Inspect() [][]inspect.Node {
	queues := make([][]inspect.Node, len(ws))
	for i, w := range ws {
		if w != nil {
			queues[i] = w.inspect()
		}
	}
	return queues
}

func (w *Worker) inspect() []inspect.Node {
	w.mu.Lock() // never held for long
	defer w.mu.Unlock()
	return append(w.q.Inspect(), inspect.Bool("serving", w.serving), inspect.Bool("interrupt_owed", w.owed),
		inspect.Count("requests", w.chains), inspect.Count("interrupts", w.interrupts), w.latency.Node("latency"))
}
