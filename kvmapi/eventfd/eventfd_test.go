package eventfd

import "testing"

func TestCounter(t *testing.T) {
	f, err := New()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if f.Pending() {
		t.Error("a new eventfd is pending")
	}
	if was, err := f.Drain(); was || err != nil {
		t.Errorf("drain of nothing: %v, %v", was, err)
	}
	for range 3 {
		if err := f.Signal(); err != nil {
			t.Fatal(err)
		}
	}
	if !f.Pending() {
		t.Error("not pending after three signals")
	}
	if n, err := f.Wait(); n != 3 || err != nil {
		t.Errorf("Wait: %d, %v", n, err)
	}
	if err := f.Signal(); err != nil {
		t.Fatal(err)
	}
	if was, err := f.Drain(); !was || err != nil || f.Pending() {
		t.Errorf("drain: %v, %v; pending %v", was, err, f.Pending())
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	if err := f.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if err := f.Signal(); err == nil {
		t.Error("Signal of a closed eventfd succeeded")
	}
}
