// Package every runs a test once for each combination of its choices: bounded exhaustive tests.
package every

import "fmt"

// Run calls f once for each sequence of choices, and returns the number of calls. Each call of pick
// is a choice among n values, and returns one of 0 to n-1. f must ask for the same choices again
// after the same answers.
func Run(f func(pick func(n int) int)) (runs int) {
	type choice struct{ value, of int }
	var choices []choice
	for {
		made := 0
		f(func(n int) int {
			if made == len(choices) {
				choices = append(choices, choice{0, n})
			}
			c := choices[made]
			if c.of != n || n < 1 {
				panic(fmt.Sprintf("every: choice %d is among %d and was among %d before", made, n, c.of))
			}
			made++
			return c.value
		})
		if made != len(choices) {
			panic(fmt.Sprintf("every: %d choices after %d before", made, len(choices)))
		}
		runs++
		last := len(choices) - 1
		for last >= 0 && choices[last].value == choices[last].of-1 {
			last--
		}
		if last < 0 {
			return runs
		}
		choices = choices[:last+1]
		choices[last].value++
	}
}
