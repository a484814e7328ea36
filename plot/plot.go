// Package plot describes plots as data. cmd/gvm makes such a description, and cmd/gvm-plot draws
// it. The drawing library is a third of a program in size and slows every start of a program that
// links it, so gvm does not.
package plot

// Version is the version of a description. gvm-plot draws only its own version.
const Version = 1

// Plot is one file. Either Latencies or Rates is set.
type Plot struct {
	Version   int        `json:"version"`
	Format    string     `json:"format"` // svg or png
	Latencies *Latencies `json:"latencies,omitempty"`
	Rates     []Panel    `json:"rates,omitempty"`
}

// Point is a place on a plot: X and Y.
type Point [2]float64

// Latencies plots requests: each one over the time of its run, and below that their distribution.
// Operations have colours; sources have shapes and dashes.
type Latencies struct {
	Title      string      `json:"title"`
	Operations []Operation `json:"operations"` // in the order of the legend
	Sources    []string    `json:"sources"`    // in the order of the legend
	Series     []Series    `json:"series"`     // in the order in which they are drawn
	Low        float64     `json:"low"`        // the lowest latency, in nanoseconds
	High       float64     `json:"high"`       // the highest one
}

// Colours is the largest number of Operations: people can tell so many colours apart.
const Colours = 8

// Operation is a line of the legend.
type Operation struct {
	Name  string `json:"name"`
	Count uint64 `json:"count"` // number of requests
}

// Series are the requests of one operation in one source.
type Series struct {
	Operation int     `json:"operation"` // index of Latencies.Operations
	Source    int     `json:"source"`    // index of Latencies.Sources
	Dots      []Point `json:"dots"`      // seconds since the start of the run, latency in nanoseconds
	Shares    []Point `json:"shares"`    // latency in nanoseconds, percentage that took no longer
}

// Panel is one of the plots beside each other: requests per second over the number of them in
// flight.
type Panel struct {
	Title  string  `json:"title"`
	Curves []Curve `json:"curves"` // in the order of the legend, the same in all panels
}

// Curve is a line of a Panel.
type Curve struct {
	Name  string `json:"name"`
	Rates []Rate `json:"rates"` // by ascending depth
}

// Rate has thousands of requests per second.
type Rate struct {
	Depth  int     `json:"depth"` // requests in flight
	Median float64 `json:"median"`
	Low    float64 `json:"low"`
	High   float64 `json:"high"`
}
