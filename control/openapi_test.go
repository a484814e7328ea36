package control

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"net/http"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"gvm/inspect"
)

var update = flag.Bool("update", false, "write docs/openapi.json")

const openAPIFile = "../docs/openapi.json"

type object = map[string]any

// openAPI describes the routes by OpenAPI 3.1.
func openAPI(routes []route) object {
	schemas := object{"Error": object{"type": "object", "required": []string{"error"},
		"properties": object{"error": object{"type": "string", "description": "one line"}}}}
	paths := object{}
	for _, r := range routes {
		path := strings.ReplaceAll(r.path, "...}", "}")
		op := object{"summary": r.does}
		if name := regexp.MustCompile(`{(.*)}`).FindStringSubmatch(path); name != nil {
			op["parameters"] = []object{{"name": name[1], "in": "path", "required": true,
				"schema": object{"type": "string"}}}
		}
		if r.body != nil {
			op["requestBody"] = object{"required": true, "content": content(schema(schemas, reflect.TypeOf(r.body)))}
		}
		responses := object{}
		if _, ok := r.answer.(stream); ok {
			responses["101"] = object{"description": "the connection carries the bytes of the protocol"}
		} else if _, ok := r.answer.(metrics); ok {
			responses["200"] = object{"description": "the metrics",
				"content": object{"text/plain": object{"schema": object{"type": "string"}}}}
		} else if r.answer == nil {
			responses["204"] = object{"description": "done"}
		} else {
			responses["200"] = object{"description": "the answer", "content": content(schema(schemas, reflect.TypeOf(r.answer)))}
		}
		for _, status := range slices.Concat(anyRequest, r.refuses) {
			responses[fmt.Sprint(status)] = object{"description": http.StatusText(status),
				"content": content(object{"$ref": "#/components/schemas/Error"})}
		}
		op["responses"] = responses
		if paths[path] == nil {
			paths[path] = object{}
		}
		paths[path].(object)[strings.ToLower(r.method)] = op
	}
	return object{
		"openapi": "3.1.0",
		"info": object{"title": "control socket of a gvm machine", "version": fmt.Sprint(Version),
			"description": "HTTP over the unix socket NAME/sock. docs/control.md explains the requests."},
		"servers":    []object{{"url": "http://gvm"}},
		"paths":      paths,
		"components": object{"schemas": schemas},
	}
}

func content(schema any) object { return object{"application/json": object{"schema": schema}} }

// schema describes a type of a body, and adds the structs that it has to all.
func schema(all object, t reflect.Type) object {
	switch {
	case t == reflect.TypeFor[inspect.Node]():
		return object{"description": "an object of named parts, or one value"}
	case t == reflect.TypeFor[State]():
		return object{"type": "string", "enum": []State{Running, Paused}}
	case t == reflect.TypeFor[Guest]():
		return object{"type": "string", "enum": []Guest{Told, Missed, Deaf, Absent, Unchanged}}
	}
	switch t.Kind() {
	case reflect.String:
		return object{"type": "string"}
	case reflect.Bool:
		return object{"type": "boolean"}
	case reflect.Int, reflect.Int64, reflect.Uint64:
		return object{"type": "integer", "format": "int64"}
	case reflect.Uint16:
		return object{"type": "integer", "minimum": 0, "maximum": 65535}
	case reflect.Slice:
		return object{"type": "array", "items": schema(all, t.Elem())}
	case reflect.Map:
		return object{"type": "object", "additionalProperties": schema(all, t.Elem())}
	case reflect.Struct:
		fields, required := object{}, []string{}
		for i := range t.NumField() {
			name, rest, _ := strings.Cut(t.Field(i).Tag.Get("json"), ",")
			fields[name] = schema(all, t.Field(i).Type)
			if rest != "omitempty" {
				required = append(required, name)
			}
		}
		s := object{"type": "object", "properties": fields}
		if len(required) > 0 {
			s["required"] = required
		}
		all[t.Name()] = s
		return object{"$ref": "#/components/schemas/" + t.Name()}
	}
	panic("no schema for " + t.String())
}

// TestOpenAPI: docs/openapi.json has the requests that the server answers, with their bodies,
// answers and statuses. go test ./control -run TestOpenAPI -update writes it.
func TestOpenAPI(t *testing.T) {
	want, err := json.MarshalIndent(openAPI(routes(newFake())), "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	want = append(want, '\n')
	if *update {
		if err := os.WriteFile(openAPIFile, want, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(openAPIFile)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("docs/openapi.json differs from the routes: go test ./control -run TestOpenAPI -update")
	}
}

// TestDocumented: docs/control.md has a row for each request that the server answers, and no other.
func TestDocumented(t *testing.T) {
	b, err := os.ReadFile("../docs/control.md")
	if err != nil {
		t.Fatal(err)
	}
	rows, served := map[string]bool{}, map[string]bool{}
	for _, m := range regexp.MustCompile("(?m)^\\| `([A-Z]+ /[^`]*)` \\|").FindAllSubmatch(b, -1) {
		rows[string(m[1])] = true
	}
	for _, r := range routes(newFake()) {
		path := strings.NewReplacer("{id}", "ID", "{path...}", "PATH").Replace(r.path)
		served[r.method+" "+path] = true
	}
	if !maps.Equal(rows, served) {
		t.Errorf("documented: %v; served: %v", slices.Sorted(maps.Keys(rows)), slices.Sorted(maps.Keys(served)))
	}
}
