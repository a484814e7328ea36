package main

import (
	"os"
	"path/filepath"

	"gvm/guest/agent/wire"
)

// agentID is the build ID of the gvm-agent that was built before this gvm, by the linker's -X;
// empty: none was. No other gvm-agent becomes the agent of a guest.
var agentID string

// ownProgram is gvm itself, which is an agent too.
const ownProgram = "/proc/self/exe"

// agentProgram returns the path of the program that becomes a guest's agent, and its build ID.
func agentProgram() (path, id string, err error) {
	if exe, err := os.Executable(); err == nil && agentID != "" {
		if path := agentIn(filepath.Dir(exe), agentID); path != "" {
			return path, agentID, nil
		}
	}
	id, err = wire.BuildID(ownProgram)
	return ownProgram, id, err
}

// agentIn returns the path of the gvm-agent in dir, or "" if there is none with that build ID.
func agentIn(dir, id string) string {
	path := filepath.Join(dir, "gvm-agent")
	if found, err := wire.BuildID(path); err != nil || found != id {
		return ""
	}
	return path
}

// agentIDs returns the build IDs of this gvm's agents.
func agentIDs() ([]string, error) {
	own, err := wire.BuildID(ownProgram)
	ids := []string{own}
	if agentID != "" {
		ids = append(ids, agentID)
	}
	return ids, err
}
